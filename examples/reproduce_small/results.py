"""From per-query results to tables and the learning curve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from examples.reproduce_small.plan import SEEDS, WORKS, Variant
from wealy_ray.retrieval.metrics import summarise

mpl.use("Agg")
VIEWS = ("all", "within_language", "cross_language")


def rows_of(evaluation: Path, systems: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Summaries by the name of a row, each over all seeds of that row.

    Args:
        evaluation: Folder of the evaluation.
        systems: Names of an evaluated row's systems, one per seed.
    """
    metrics = json.loads((evaluation / "metrics.json").read_text())
    per_query = {system["name"]: evaluation / system["per_query"] for system in metrics["systems"]}
    found = {}
    for name, seeds in systems.items():
        tables = [pq.read_table(per_query[seed]) for seed in seeds]
        rows = pa.concat_tables(tables)
        views = {}
        for view in VIEWS:
            chosen = rows.filter(pc.equal(rows["view"], view))
            views[view] = summarise(chosen)
        means = [pc.mean(t.filter(pc.equal(t["view"], "all"))["ap"]).as_py() for t in tables]
        found[name] = {"views": views, "seeds": means}
    return found


def table_of(rows: Mapping[str, Any]) -> str:
    """A table in Markdown: means over seeds, intervals by the bootstrap over cliques."""
    lines = [
        "| | MAP | 95 % (cliques) | by seed | within language | across languages | MR1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        everyone = row["views"]["all"]
        seeds = ", ".join(f"{value:.3f}" for value in row["seeds"]) if len(row["seeds"]) > 1 else "-"
        ap = everyone["map"]
        cells = [
            name,
            f"{ap['mean']:.3f}",
            f"{ap['low']:.3f} - {ap['high']:.3f}",
            seeds,
            *(f"{row['views'][view]['map']['mean']:.3f}" for view in VIEWS[1:]),
            f"{everyone['mr1']['mean']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curve(rows: Mapping[str, Any], path: Path) -> None:
    """MAP against training works, with the baselines that learn nothing as lines."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for system, colour, marker in (("WEALY", "#0b6e99", "o"), ("Avg+MLP", "#c2571a", "s")):
        names = [f"{system}, {works} works" for works in WORKS[:-1]] + [system]
        summaries = [rows[name]["views"]["all"]["map"] for name in names]
        axes.plot(WORKS, [s["mean"] for s in summaries], color=colour, marker=marker, label=system)
        axes.fill_between(
            WORKS, [s["low"] for s in summaries], [s["high"] for s in summaries], color=colour, alpha=0.12
        )
    lines = (("TF-IDF, characters", "#555555", "-."), ("AvgEmb, standardised", "#555555", "--"))
    for name, colour, style in (*lines, ("AvgEmb", "#999999", ":"), ("same language", "#bbbbbb", "-")):
        axes.axhline(rows[name]["views"]["all"]["map"]["mean"], color=colour, linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_xticks(WORKS, [str(works) for works in WORKS])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("training works")
    axes.set_ylabel(f"MAP on held-out works (mean of {len(SEEDS)} seeds)")
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    axes.set_title("Bands: 95 % by a bootstrap over cliques", fontsize=9, loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def groups(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    """Variants by their table."""
    found: dict[str, list[Variant]] = {}
    for variant in variants:
        found.setdefault(variant.group, []).append(variant)
    return found
