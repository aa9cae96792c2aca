"""Style of the pictures: few colors, no boxes, lines named where they end, and small files."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, RED = "#2464bd", "#b8590f", "#b3261e"
TEXT, SOFT, FAINT = "#17202b", "#566373", "#d3dae2"
DOTS_PER_INCH = 110
COLORS = 128

plt.rcParams |= {
    "font.size": 9,
    "text.color": TEXT,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e9ee",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.8,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
}


def percent(share: float) -> str:
    """Return a share as a whole percentage."""
    return f"{100 * share:.0f} %"


def apart(places: Iterable[float], distance: float) -> list[float]:
    """Return places on a line, moved as little as needed to be a distance apart; in the order given."""
    order = sorted(enumerate(places), key=lambda item: item[1])
    groups: list[list[tuple[int, float]]] = []
    for item in order:
        groups.append([item])
        while len(groups) > 1 and _bottom(groups[-1], distance) < _top(groups[-2], distance):
            last = groups.pop()
            groups[-1] += last
    moved = [0.0] * len(order)
    for group in groups:
        for step, (index, _) in enumerate(group):
            moved[index] = _bottom(group, distance) + distance * (step + 0.5)
    return moved


def _middle(group: list[tuple[int, float]]) -> float:
    return sum(place for _, place in group) / len(group)


def _bottom(group: list[tuple[int, float]], distance: float) -> float:
    return _middle(group) - distance * len(group) / 2


def _top(group: list[tuple[int, float]], distance: float) -> float:
    return _middle(group) + distance * len(group) / 2


def name_ends(
    axis: Any, ends: Iterable[tuple[float, float, str, str]], distance: float, size: float = 9
) -> None:
    """Write beside the end of each line what it is, without overlap.

    Args:
        axis: Of matplotlib.
        ends: x, y, text and color of each line.
        distance: Of two texts, in units of y.
        size: Of the text, in points.
    """
    known = list(ends)
    places = apart((y for _, y, _, _ in known), distance)
    for (x, _, text, color), y in zip(known, places, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=size,
            annotation_clip=False,
        )


def save(figure: Any, path: Path) -> None:
    """Write a picture with few colors and close it."""
    figure.set_layout_engine("constrained")
    with BytesIO() as whole:
        figure.savefig(whole, dpi=DOTS_PER_INCH)
        with Image.open(whole) as image:
            reduced = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)
    plt.close(figure)
