"""Metrics as a plain table for a terminal or a job log."""

from __future__ import annotations

from typing import Any


def metrics_table(out: str, metrics: dict[str, Any]) -> str:
    """One row per system: MAP overall, within and across languages, with 1.96 sd / sqrt(n), and more."""
    c = metrics["collection"]
    head = ["", "MAP", "within language", "cross language", "MR1", "hit@1", "hit@10", "missing"]
    rows = [head, *(_row(system) for system in metrics["systems"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    policy = "left out" if c["policy"] == "drop" else "ranked last"
    title = (
        f"evaluation finished: {out}\n"
        f"  {c['queries']} queries of {c['cliques']} cliques among {c['candidates']} candidates; "
        f"{c['without_states']} of {c['tracks']} tracks without states, {policy}"
    )
    chosen = [
        f"  weight of '{curve['name']}': {curve['chosen']:g}, chosen on split '{curve['split']}'"
        for curve in metrics["fusion_curves"]
    ]
    chosen += [
        f"  '{f['name']}': {' + '.join(f'{w:.3g} x {name}' for name, w in f['fitted'])}, fitted on split '{f['split']}'"
        for f in metrics["fitted_fusions"]
    ]
    if metrics["tuned_on_test"]:
        chosen.append(
            "  these weights were chosen on tracks that are reported on: their fusions' figures are too good"
        )
    return "\n".join([title, *lines, *chosen])


def _row(system: dict[str, Any]) -> list[str]:
    views = system["views"]
    cells = [system["name"]]
    for view in ("all", "within_language", "cross_language"):
        found = views.get(view)
        cells.append(f"{found['map']['mean']:.3f} +- {found['map']['ci']:.3f}" if found else "-")
    everyone = views["all"]
    cells += [f"{everyone['mr1']['mean']:.1f}", *(f"{everyone[m]['mean']:.3f}" for m in ("hit_1", "hit_10"))]
    return [*cells, str(system["missing"])]
