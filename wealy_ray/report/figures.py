"""The figures of an evaluation's report: one function each, from plain numbers to the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wealy_ray.report.canvas import COLOURS, MARKERS, blank, legend, png, wrapped

MAX_SYSTEMS = len(COLOURS)
"""Systems that one figure tells apart."""
MAP_LIMITS = (-0.03, 1.03)  # room for the markers of 0 and 1
FIRST_RANK_EDGES = (1, 2, 6, 11, 31, 101, 1001, 10_001, 100_001)
"""Least rank of each class of the first hit's rank."""

Span = tuple[float, float, float]
"""A mean and the ends of its interval."""


@png
def map_overview(spans: Mapping[str, Span]) -> Figure:
    """MAP of each system with its interval, best first."""
    names = sorted(spans, key=lambda name: spans[name][0])
    figure = blank(1.0 + 0.36 * len(names))
    axes = figure.subplots()
    for y, name in enumerate(names):
        mean = spans[name][0]
        _dot(axes, spans[name], y, COLOURS[0], "o")
        axes.annotate(f"{mean:.3f}", (mean, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.set_xlim(*MAP_LIMITS)
    axes.set_xlabel("MAP (0 to 1); bars: 95 % interval over cliques")
    return figure


@png
def map_by_group(groups: Mapping[str, Mapping[str, Span]], what: str, sizes: Mapping[str, int]) -> Figure:
    """MAP by group of queries, one dot per system.

    Args:
        groups: System -> group -> span; a system may lack groups.
        what: What the groups are, e.g. `clique size (versions)`.
        sizes: Group -> number of queries, from top to bottom.
    """
    order = list(sizes)
    step = 0.8 / max(len(groups), 1)
    figure = blank(1.1 + 0.2 * len(groups) + max(1.6, len(order) * max(0.4, 0.14 * len(groups))))
    axes = figure.subplots()
    for i, spans in enumerate(groups.values()):
        for y, group in enumerate(order):
            if group in spans:
                _dot(axes, spans[group], y + (i - (len(groups) - 1) / 2) * step, COLOURS[i], MARKERS[i])
    for y in range(1, len(order)):
        axes.axhline(y - 0.5, color="#bbbbbb", linewidth=0.6)
    axes.set_yticks(range(len(order)), [f"{group}  (n = {sizes[group]:,})" for group in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(*MAP_LIMITS)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("MAP (0 to 1); bars: 95 % interval over cliques")
    axes.set_ylabel(what)
    legend(figure, axes, list(groups))
    return figure


@png
def precision_recall(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Interpolated precision at the recalls 0, 0.1, ..., 1, mean over queries."""
    figure = blank(3.7 + 0.2 * len(curves))
    axes = figure.subplots()
    for i, precision in enumerate(curves.values()):
        axes.plot(np.linspace(0, 1, 11), precision, color=COLOURS[i], marker=MARKERS[i], markersize=5)
    axes.set(xlim=(-0.02, 1.02), ylim=(0, 1.02), xlabel="recall (share of a query's versions)")
    axes.set_ylabel("interpolated precision (share)")
    legend(figure, axes, list(curves))
    return figure


@png
def first_ranks(ranks: Mapping[str, np.ndarray]) -> Figure:
    """Histogram of the first hit's rank, one panel per system."""
    deepest = max(int(r.max()) for r in ranks.values())
    least = [edge for edge in FIRST_RANK_EDGES if edge <= max(deepest, 11)]
    edges = [*least, max(deepest, least[-1]) + 1]
    labels = [f"{a:,}" if b - a == 1 else f"{a:,}-{b - 1:,}" for a, b in zip(least, edges[1:], strict=True)]
    columns = min(2, len(ranks))
    rows = -(-len(ranks) // columns)
    figure = blank(0.9 + 1.7 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (name, first) in enumerate(ranks.items()):
        shares = 100 * np.histogram(first, edges)[0] / len(first)
        panels[i].bar(range(len(shares)), shares, color=COLOURS[i], width=0.85)
        panels[i].set_title(wrapped(name), fontsize=10)
    for panel in panels[len(ranks) :]:
        panel.set_visible(False)
    for i in range(len(ranks)):
        panels[i].grid(visible=False, axis="x")
        panels[i].set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        panels[i].tick_params(labelbottom=i + columns >= len(ranks))
    figure.supxlabel("rank of the first hit (1 is best)", fontsize=10)
    figure.supylabel("queries (%)", fontsize=10)
    return figure


@png
def fusion_curves(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """MAP against the fusion weight, on an axis of square roots; a ring marks the chosen one."""
    figure = blank(3.3 + 0.2 * min(len(curves), MAX_SYSTEMS))
    axes = figure.subplots()
    names = []
    for i, curve in enumerate(curves[:MAX_SYSTEMS]):
        places, values = _rooted(curve["weights"]), np.asarray(curve["map"], float)
        axes.plot(places, values, color=COLOURS[i], marker=MARKERS[i], markersize=5)
        if curve.get("chosen") is not None:
            best = np.argmin(np.abs(places - _rooted([curve["chosen"]])))
            ring: dict[str, Any] = {"facecolors": "none", "edgecolors": COLOURS[i], "linewidths": 1.6}
            axes.scatter(places[best : best + 1], values[best : best + 1], s=170, zorder=3, **ring)
        names.append(f"{curve['name']} ({curve['split']})" if curve.get("split") else str(curve["name"]))
    ticks = _apart(sorted({float(w) for curve in curves for w in curve["weights"]}))
    axes.set_xticks(_rooted(ticks), [f"{weight:g}" for weight in ticks])
    axes.margins(y=0.12)
    axes.set_xlabel("fusion weight; ring: the chosen one")
    axes.set_ylabel("MAP (0 to 1)")
    legend(figure, axes, names)
    return figure


@png
def similarity_matrix(similarity: np.ndarray, clique_ids: Sequence[str]) -> Figure:
    """Similarities of a sample, its tracks in the order of their cliques; lines part the cliques.

    Args:
        similarity: [n, n]; what is not finite stays white.
        clique_ids: The n tracks' cliques.
    """
    cliques = np.asarray(clique_ids, dtype=str)
    order = np.argsort(cliques, kind="stable")
    matrix = np.asarray(similarity, dtype=np.float64)[np.ix_(order, order)]
    figure = blank(4.7)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="cividis", interpolation="nearest")
    borders = np.flatnonzero(cliques[order][1:] != cliques[order][:-1]) + 0.5
    if len(borders) <= 40:  # more lines would hide what they part
        for border in borders:
            axes.axhline(border, color="white", linewidth=0.6)
            axes.axvline(border, color="white", linewidth=0.6)
    axes.grid(visible=False)
    axes.set_xlabel("track of the sample (number, sorted by clique)")
    axes.set_ylabel("track of the sample (number)")
    figure.colorbar(image, ax=axes, shrink=0.85, label="similarity")
    return figure


@png
def counts(named: Mapping[str, int], what: str, max_names: int = 15) -> Figure:
    """Horizontal bars of counts, the largest first; the rest is one bar."""
    ranked = sorted(named.items(), key=lambda item: -item[1])
    rest = ranked[max_names:]
    bars = ranked[:max_names] + ([(f"{len(rest)} others", sum(n for _, n in rest))] if rest else [])
    figure = blank(0.9 + 0.27 * len(bars))
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), [n for _, n in bars], color=COLOURS[0])
    axes.bar_label(drawn, [f"{n:,}" for _, n in bars], padding=3, fontsize=9)
    axes.set_yticks(range(len(bars)), [name or "unknown" for name, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(what)
    return figure


@png
def histogram(
    values: Sequence[float], what: str, of: str, limits: tuple[float, float] | None = None
) -> Figure:
    """Histogram of a quantity; `what` is its name with unit, `of` what is counted."""
    figure = blank(2.9)
    axes = figure.subplots()
    axes.hist(
        np.asarray(values, dtype=np.float64), bins=30, range=limits, color=COLOURS[0], edgecolor="white"
    )
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(what)
    axes.set_ylabel(of)
    axes.yaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    return figure


def _dot(axes: Axes, span: Span, y: float, colour: str, marker: str) -> None:
    mean, low, high = span
    axes.hlines(y, low, high, color=colour, linewidth=1.6)
    axes.plot([mean], [y], marker=marker, color=colour, markersize=5, linestyle="none")


def _rooted(weights: Sequence[float]) -> np.ndarray:
    """Where weights stand: most of what is tried is small."""
    values = np.asarray(weights, np.float64)
    return np.sign(values) * np.sqrt(np.abs(values))


def _apart(weights: Sequence[float]) -> list[float]:
    """Ascending weights whose labels do not touch: the last, and others before it."""
    places = _rooted(weights)
    kept = [len(weights) - 1]
    for i in range(len(weights) - 2, -1, -1):
        if places[kept[-1]] - places[i] > 0.07 * np.ptp(places):
            kept.append(i)
    return [weights[i] for i in reversed(kept)]
