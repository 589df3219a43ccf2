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

from examples.reproduce_small.plan import SEEDS, WORKS
from wealy_ray.retrieval.metrics import map_gain, summarise

mpl.use("Agg")
VIEWS = ("all", "within_language", "cross_language")


def rows_of(evaluation: Path, systems: Mapping[str, Sequence[str]], reference: str) -> dict[str, Any]:
    """Summaries by the name of a row, each over all seeds of that row, and its MAP against that of a reference.

    Args:
        evaluation: Folder of the evaluation.
        systems: Names of an evaluated row's systems, one per seed.
        reference: The row that all others are compared with, query by query.
    """
    metrics = json.loads((evaluation / "metrics.json").read_text())
    per_query = {system["name"]: evaluation / system["per_query"] for system in metrics["systems"]}
    tables = {name: [pq.read_table(per_query[seed]) for seed in seeds] for name, seeds in systems.items()}
    found = {}
    for name, mine in tables.items():
        rows = pa.concat_tables(mine)
        found[name] = {
            "views": {view: summarise(rows.filter(pc.equal(rows["view"], view))) for view in VIEWS},
            "seeds": [pc.mean(t.filter(pc.equal(t["view"], "all"))["ap"]).as_py() for t in mine],
            "gain": map_gain(_mean_of_seeds(mine), _mean_of_seeds(tables[reference])),
        }
    return found


def _mean_of_seeds(tables: Sequence[pa.Table]) -> pa.Table:
    """Each query's AP, averaged over seeds."""
    tables = [t.filter(pc.equal(t["view"], "all")).sort_by("track_id") for t in tables]
    mean = np.mean([t["ap"].to_numpy() for t in tables], axis=0)
    return tables[0].select(["track_id", "clique_id"]).append_column("ap", pa.array(mean))


def table_of(rows: Mapping[str, Any]) -> str:
    """A table in Markdown: means over seeds, intervals by the bootstrap over cliques."""
    lines = [
        "| | MAP | 95 % (cliques) | against WEALY | by seed | within language | across languages | MR1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        everyone = row["views"]["all"]
        seeds = ", ".join(f"{value:.3f}" for value in row["seeds"]) if len(row["seeds"]) > 1 else "-"
        ap = everyone["map"]
        cells = [
            name,
            f"{ap['mean']:.3f}",
            f"{ap['low']:.3f} to {ap['high']:.3f}",
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["gain"]) if any(row["gain"]) else "-",
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
