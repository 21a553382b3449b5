"""How a figure becomes part of the page: one look, and SVG that is the same every time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Who told us: everything measured on the engine is blue, everything simulated is orange.
ENGINE = "#1f5f91"
ENGINE_PALE = "#a9c8e2"
SIMULATOR = "#d0701c"
SIMULATOR_PALE = "#f3cda6"
NEUTRAL = "#8a8f94"
NEUTRAL_PALE = "#eceef0"
ALARM = "#b3261e"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same on every machine
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#3c4043",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ea",
    "grid.linewidth": 0.7,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of the page: one or more SVG elements that stand together, and the sentence that says what to see."""

    svgs: tuple[str, ...]
    caption: str


def draw(name: str, width: int, height: int, paint: Callable[[list[Axes]], None], **grid: Any) -> str:
    """One SVG element without a fixed size; it fills the width it is given.

    Args:
        name: unique on the page; keeps the ids inside apart from those of its neighbours.
        width, height: of the drawing, CSS pixels at its natural size.
        paint: draws on the axes, in reading order.
        grid: for `Figure.subplots`.
    """
    # No pyplot, and a style of our own: a notebook's settings neither leak in nor are changed.
    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.subplots(squeeze=False, **grid)
        paint(list(axes.flat))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(name, text.getvalue())


def legend_above(axis: Axes) -> None:
    """In one line above the right end, where it covers no data."""
    axis.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, borderaxespad=0, handlelength=1.2, columnspacing=1
    )


def _inline(name: str, document: str) -> str:
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # A hundred labels need not each name their font; the page's style sheet does.
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name.replace("-", " ")}" ', 1)
