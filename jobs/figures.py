"""What every picture of numbers has in common: its size, axes, colours and grid, and how it becomes PNG.

matplotlib's Agg canvas, without a display and without its global state; the same numbers give the same bytes.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from model.evaluation.libraries import library

# Told apart also by people who confuse red and green (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DPI = 150


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure of ``width`` by ``height`` inches, and the axes of its panels from left to right."""
    figure = library("matplotlib.figure").Figure(figsize=(width, height), dpi=_DPI)
    library("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    row = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in row:
        axes.set_prop_cycle(color=COLOURS)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, row


def add_grid(axes: Any, axis: str = "both") -> None:
    """Thin grey lines; ``axis``: x, y or both."""
    axes.grid(axis=axis, color="#dddddd", linewidth=0.6)


def png(figure: Any) -> bytes:
    """The file, cut to what is drawn; write it with ``storage.put``, whole or not at all."""
    sink = BytesIO()
    # Without the version of matplotlib in it, a renewed library alone does not change the file.
    figure.savefig(sink, format="png", bbox_inches="tight", metadata={"Software": None})
    return sink.getvalue()
