"""Generates the pictures and component tables of `architecture.md` from the code and its import contracts.

    python -m docs.make_architecture

A test fails if a picture or a table is out of date. The code calls a component of a package a room.
"""

import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from tests.structure.rooms import (
    PACKAGES,
    ROOT,
    Arrow,
    Structure,
    direct_arrows,
    read_structure,
    room_path,
    sentence_of,
    subpackages,
)

DOCS: Final = ROOT / "docs"
PAGE: Final = DOCS / "architecture.md"
IMAGES: Final = DOCS / "images"

WIDTH: Final = 1000.0
MAX_BOX_WIDTH: Final = 280.0
LANE_WIDTH: Final = 14.0  # space for an arrow that crosses a layer
MARGIN: Final = 24.0
COLUMN_GAP: Final = 22.0
LANE_GAP: Final = 12.0
PADDING: Final = 12.0
ROW_GAP: Final = 44.0
LINE_HEIGHT: Final = 15.0
CHARACTER_WIDTH: Final = 6.2
SWEEPS: Final = 20
SEEDS: Final = 40
LANE_WEIGHT: Final = 6

STYLE: Final = """\
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 11.5px; fill: #33414f; }
.name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 14px; font-weight: bold; fill: #10304f; }
.box { fill: #f3f7fb; stroke: #5f7a96; stroke-width: 1.2; }
.arrow { fill: none; stroke: #7b8fa3; stroke-width: 1.4; }
"""
HEAD: Final = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0,0.5 L8,4 L0,7.5 Z" fill="#7b8fa3"/></marker>'
)


@dataclass(eq=False)
class Place:
    """A position on a layer: the box of a room, or the lane of an arrow that crosses the layer.

    Attributes:
        layer: Index of the layer, 0 at the top.
        room: Name of the room; empty for a lane.
        width: Width in pixels.
        x: Center in pixels.
    """

    layer: int
    room: str
    width: float = LANE_WIDTH
    x: float = 0.0


class Layout:
    """Layered layout of rooms and arrows (Sugiyama, Tagawa and Toda, 1981).

    Args:
        structure: Rooms and imports of the package.
        seed: Seed of the initial order.
    """

    def __init__(self, structure: Structure, seed: int) -> None:
        start = random.Random(seed)  # noqa: S311 - the same picture every time
        self.rows: list[list[Place]] = [
            [Place(number, room, x=start.random() * WIDTH) for room in layer]
            for number, layer in enumerate(structure.layers)
        ]
        boxes = {place.room: place for row in self.rows for place in row}
        self.ways = [self._way(boxes, arrow) for arrow in direct_arrows(structure)]
        self._links = [link for way in self.ways for link in pairwise(way)]
        self.box_width = min(MAX_BOX_WIDTH, *map(widest_box, self.rows))
        for box in boxes.values():
            box.width = self.box_width
        for _ in range(SWEEPS):
            for row in (*self.rows, *reversed(self.rows)):
                row.sort(key=self._wanted)
                spread(row, [self._wanted(place) for place in row])
        for _ in range(SWEEPS):
            for row in (*self.rows, *reversed(self.rows)):
                spread(row, [self._wanted(place) for place in row])
        self._center()

    @property
    def cost(self) -> tuple[int, float]:
        """Number of arrow crossings, then the total horizontal length of the arrows in pixels."""
        crossings = sum(
            (a.x - c.x) * (b.x - d.x) < 0
            for (a, b), (c, d) in combinations(self._links, 2)
            if a.layer == c.layer
        )
        return crossings, sum(abs(a.x - b.x) for a, b in self._links)

    def _center(self) -> None:
        edges = [(place.x, place.width / 2) for row in self.rows for place in row]
        left = min(x - half for x, half in edges)
        right = max(x + half for x, half in edges)
        for row in self.rows:
            for place in row:
                place.x += (WIDTH - left - right) / 2

    def _way(self, boxes: dict[str, Place], arrow: Arrow) -> list[Place]:
        """Return the places along an arrow, with a lane on every layer that it crosses."""
        start, end = boxes[arrow[0]], boxes[arrow[1]]
        lanes = [Place(number, "") for number in range(start.layer + 1, end.layer)]
        for lane in lanes:
            self.rows[lane.layer].append(lane)
        return [start, *lanes, end]

    def _wanted(self, place: Place) -> float:
        """Return the weighted mean x of a place's neighbors; lanes weigh more, to keep arrows straight."""
        others = [a if b is place else b for a, b in self._links if place in (a, b)]
        weights = [LANE_WEIGHT if not place.room and not other.room else 1 for other in others]
        if not others:
            return WIDTH / 2
        weighted = zip(others, weights, strict=True)
        return sum(other.x * weight for other, weight in weighted) / sum(weights)


def gap(left: Place, right: Place) -> float:
    """Return the minimum distance between two places."""
    return COLUMN_GAP if left.room and right.room else LANE_GAP


def widest_box(row: Sequence[Place]) -> float:
    """Return the maximum box width with which a layer fits on the page."""
    count = sum(bool(place.room) for place in row)
    taken = 2 * MARGIN + (len(row) - count) * (LANE_WIDTH + 2 * LANE_GAP) + (count - 1) * COLUMN_GAP
    return (WIDTH - taken) // count


def spread(row: Sequence[Place], wanted: Sequence[float]) -> None:
    """Move the places of a layer as close as possible to their wanted positions, without overlap or reordering."""
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + gap(left, right))
    least = MARGIN + row[0].width / 2
    most = WIDTH - MARGIN - row[-1].width / 2 - offsets[-1]
    blocks: list[list[float]] = []  # sum and count of adjacent places that touch
    for target, offset in zip(wanted, offsets, strict=True):
        blocks.append([target - offset, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [total / count for total, count in blocks for _ in range(int(count))]
    for place, start, offset in zip(row, starts, offsets, strict=True):
        place.x = max(least, min(most, start)) + offset


def best_layout(structure: Structure) -> Layout:
    """Return the layout with the lowest cost over all seeds."""
    return min((Layout(structure, seed) for seed in range(SEEDS)), key=lambda made: made.cost)


def picture(structure: Structure) -> str:
    """Return an SVG of a package: its rooms as boxes in layers, their direct imports as arrows."""
    layout = best_layout(structure)
    characters = int((layout.box_width - 2 * PADDING) / CHARACTER_WIDTH)
    texts = {
        room: textwrap.wrap(sentence_of(structure.package, room).replace("`", ""), characters)
        for room in structure.rooms
    }
    tops, heights, y = [], [], MARGIN
    for row in layout.rows:
        line_count = max(len(texts[place.room]) for place in row if place.room)
        tops.append(y)
        heights.append(34 + line_count * LINE_HEIGHT)
        y += heights[-1] + ROW_GAP
    height = y - ROW_GAP + MARGIN
    size = f'width="{WIDTH:.0f}" height="{height:.0f}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" {size} role="img">',
        f"<title>Components of {structure.package} and their imports</title>",
        f"<style>\n{STYLE}</style>",
        HEAD,
        f'<rect {size} fill="#ffffff"/>',
        *_arrows(layout, tops, heights),
    ]
    for row, top, row_height in zip(layout.rows, tops, heights, strict=True):
        for place in row:
            if place.room:
                lines += _box(place, top, row_height, texts[place.room])
    return "\n".join([*lines, "</svg>", ""])


def _box(place: Place, top: float, height: float, text: Sequence[str]) -> Iterator[str]:
    left = place.x - place.width / 2
    yield (
        f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{place.width:.0f}" '
        f'height="{height:.0f}" rx="6"/>'
    )
    yield f'<text class="name" x="{left + PADDING:.1f}" y="{top + 22:.1f}">{escape(place.room)}</text>'
    for number, line in enumerate(text):
        y = top + 40 + number * LINE_HEIGHT
        yield f'<text x="{left + PADDING:.1f}" y="{y:.1f}">{escape(line)}</text>'


def _arrows(layout: Layout, tops: Sequence[float], heights: Sequence[float]) -> Iterator[str]:
    """Yield the arrows, from the lower edge of the importer through the lanes to the upper edge of the imported."""
    for way in layout.ways:
        start = _port(way[0], [other[1] for other in layout.ways if other[0] is way[0]], way[1])
        end = _port(way[-1], [other[-2] for other in layout.ways if other[-1] is way[-1]], way[-2])
        x, y = start, tops[way[0].layer] + heights[way[0].layer]
        path = f"M{x:.1f},{y:.1f}"
        for place in way[1:]:
            next_x = end if place is way[-1] else place.x
            next_y = tops[place.layer] - (2 if place is way[-1] else 0)
            middle = (y + next_y) / 2
            path += f" C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}"
            x, y = next_x, next_y
            if place is not way[-1]:
                y += heights[place.layer]
                path += f" V{y:.1f}"
        yield f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def _port(box: Place, neighbors: Sequence[Place], neighbor: Place) -> float:
    """Return the x at which the arrow to a neighbor meets the edge of a box; arrows keep the neighbors' order."""
    order = sorted(neighbors, key=lambda place: place.x)
    number = next(index for index, place in enumerate(order) if place is neighbor)
    step = min(36.0, box.width / (len(order) + 1))
    return box.x + (number - (len(order) - 1) / 2) * step


def room_table(structure: Structure) -> str:
    """Return the rooms of a package as a Markdown table with their purposes and imports."""
    lines = ["| component | purpose | imports |", "|---|---|---|"]
    for room in structure.rooms:
        imports = ", ".join(f"`{other}`" for other in structure.imports_of(room)) or "none"
        lines.append(_row(structure.package, room, imports))
        lines += [
            _row(structure.package, inner, "") for inner in subpackages(structure.package, room)
        ]
    return "\n".join(lines) + "\n"


def _row(package: str, room: str, imports: str) -> str:
    path = room_path(package, room).relative_to(ROOT)
    name = room.replace(".", "/")
    sentence = sentence_of(package, room).replace("|", "\\|")
    return f"| [`{name}`](../{path}) | {sentence} | {imports} |"


def page(text: str) -> str:
    """Return the text of the page with the tables regenerated."""
    for package in PACKAGES:
        begin, end = (f"<!-- {word}: rooms of {package} -->\n" for word in ("begin", "end"))
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{room_table(read_structure(package))}\n{end}{after}"
    return text


def pictures() -> dict[Path, str]:
    """Return the pictures by file path."""
    return {
        IMAGES / f"architecture-{package.replace('_', '-')}.svg": picture(read_structure(package))
        for package in PACKAGES
    }


if __name__ == "__main__":
    for target, svg in pictures().items():
        target.write_text(svg)
    PAGE.write_text(page(PAGE.read_text()))
