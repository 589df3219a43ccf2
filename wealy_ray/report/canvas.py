"""What all figures share: style, colours, and the way from a figure to the bytes of a PNG.

Figures are narrow with large letters, so that they can be read on a phone. Systems differ in colour (Okabe and Ito's
palette, safe for colour-blind readers) and in marker, so that neither is needed alone.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

WIDTH_INCH = 5.6
DPI = 160  # 5.6 x 160 = 896 pixels wide
STYLE: Any = {
    "font.size": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a system's name may hold dollar signs
}

P = ParamSpec("P")


def png(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Draws in our style and returns the file; no figure stays in matplotlib's global state."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            sink = io.BytesIO()
            # no software version in the file: equal numbers make equal bytes
            FigureCanvasAgg(figure).print_png(sink, metadata={"Software": None})
        return sink.getvalue()

    return drawn


def blank(height_inch: float) -> Figure:
    """An empty figure of the usual width."""
    return Figure(figsize=(WIDTH_INCH, height_inch), dpi=DPI, layout="constrained")


def legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend below the plot, which hides no data and takes no width."""
    keys = [
        axes.plot([], [], color=COLOURS[i], marker=MARKERS[i], markersize=5)[0] for i in range(len(names))
    ]
    labels = [wrapped(name, 44) for name in names]
    figure.legend(keys, labels, loc="outside lower left", ncols=1 if len(names) < 4 else 2, fontsize=9)


def wrapped(name: str, width: int = 26) -> str:
    """A name cut into lines."""
    return "\n".join(textwrap.wrap(name, width)) or name
