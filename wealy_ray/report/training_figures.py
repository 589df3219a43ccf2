"""The curves of a training's report."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from wealy_ray.report.canvas import COLOURS, MARKERS, blank, legend, png
from wealy_ray.report.history import History

WIDE_RANGE = 30.0
"""Largest value over least above which an axis is logarithmic."""
SHARE_OF_ROOM = 0.08


@png
def loss_curve(history: History) -> Figure:
    """The loss of each epoch, its smoothed course, and the best epoch."""
    figure = blank(3.7)
    axes = figure.subplots()
    axes.plot(
        history.epochs,
        history.loss,
        MARKERS[0],
        color=COLOURS[0],
        markersize=_marker_size(history),
        alpha=0.5,
    )
    axes.plot(history.epochs, history.smoothed_loss, color=COLOURS[0], linewidth=2)
    _scale(axes, history.loss)
    if len(history.maps):
        _mark_best(axes, history)
    axes.set_ylabel("loss, mean over an epoch's batches")
    return _by_epoch(figure, axes, history)


@png
def map_curve(history: History, chance: float | None) -> Figure:
    """Validation MAP; a ring marks the best, a dashed line chance."""
    figure = blank(3.7)
    axes = figure.subplots()
    axes.plot(
        history.measured, history.maps, color=COLOURS[0], marker=MARKERS[0], markersize=_marker_size(history)
    )
    best, epoch = history.maps[history.best], history.measured[history.best]
    axes.plot([epoch], [best], "o", markersize=13, mfc="none", mec=COLOURS[1], mew=2)
    side = "right" if epoch > history.epochs[-1] / 2 else "left"
    axes.annotate(
        f"{best:.3f} in epoch {epoch}",
        (epoch, best),
        (0, 11),
        textcoords="offset points",
        ha=side,
        fontsize=9,
    )
    if chance is not None:
        axes.axhline(chance, color="#595959", linestyle="--", linewidth=1)
        axes.annotate(
            "chance", (1, chance), (-2, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=9
        )
    top = max(best, chance or 0.0)
    axes.set_ylim(0, top * (1 + 2 * SHARE_OF_ROOM) or 1.0)
    axes.set_ylabel("validation MAP (0 to 1)")
    return _by_epoch(figure, axes, history)


@png
def rate_curve(history: History) -> Figure:
    """The learning rate at each epoch's start."""
    figure = blank(2.9)
    axes = figure.subplots()
    axes.plot(
        history.epochs,
        history.learning_rate,
        color=COLOURS[0],
        marker=MARKERS[0],
        markersize=_marker_size(history),
    )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    return _by_epoch(figure, axes, history)


@png
def norm_curve(history: History, clip: float) -> Figure:
    """Norm of the gradients before clipping, and the clip."""
    figure = blank(3.1)
    axes = figure.subplots()
    norms = history.gradient_norm
    axes.plot(history.epochs, norms, color=COLOURS[0], marker=MARKERS[0], markersize=_marker_size(history))
    axes.plot(history.epochs[[0, -1]], [clip, clip], color=COLOURS[1], marker=MARKERS[1], markersize=5)
    _scale(axes, np.append(norms, clip))
    axes.set_ylabel("norm of all gradients")
    legend(figure, axes, ["mean of an epoch, before clipping", "optimiser.clip"])
    return _by_epoch(figure, axes, history)


def _by_epoch(figure: Figure, axes: Axes, history: History) -> Figure:
    last = int(history.epochs[-1])
    room = max(0.5, 0.02 * last)
    axes.set_xlim(1 - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")
    return figure


def _mark_best(axes: Axes, history: History) -> None:
    epoch = history.measured[history.best]
    axes.axvline(epoch, color=COLOURS[1], linestyle=":", linewidth=1.5, zorder=1)
    side, shift = ("right", -4) if epoch > history.epochs[-1] / 2 else ("left", 4)
    text = f"best MAP, epoch {epoch}"
    where = ("data", "axes fraction")
    axes.annotate(text, (epoch, 1), (shift, -10), where, "offset points", ha=side, fontsize=9)


def _scale(axes: Axes, values: np.ndarray) -> None:
    """From 0 on, unless values are so far apart that the small ones could not be read."""
    least, most = values.min(), values.max()
    if least > 0 and most > WIDE_RANGE * least:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # ten to the power of is math, which our style does not parse
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif least >= 0:
        axes.set_ylim(0, most * (1 + SHARE_OF_ROOM) or 1.0)


def _marker_size(history: History) -> float:
    return 5.0 if len(history) <= 60 else 2.0
