"""Chart geometry for SVG templates, at two widths, with a text summary and a table for accessibility.

Positions are in view-box units and rounded, to keep the page small. Colors are CSS classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qflare_server.serving.dashboard.formatting import NONE

Point = tuple[float, float]
Position = Callable[[float], float]
"""Gives the place of a value in a drawing."""
TICKS: Final = 4
WIDE: Final = (640, 270)
COMPACT: Final = (340, 230)
NARROW: Final = frozenset({"compact", "small"})
MARKED_POINTS: Final = 60
LOW: Final = (640, 200)
Size = tuple[int, int]
SIZES: Final[Mapping[str, Size]] = {"wide": WIDE, "compact": COMPACT}
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 12.0, 44.0


@dataclass(frozen=True)
class Series:
    """One line: its legend name, the class of its color, and its points by x."""

    name: str
    css: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Limit:
    """A value of y to stay above or below: what it is called and where it lies."""

    name: str
    value: float


@dataclass(frozen=True)
class SmallLine:
    """A line without axes among others on the same scale: `path` is its own, `behind` that of all together."""

    name: str
    last: str
    words: str
    path: str
    behind: str
    end: Point


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A data point: its position and its label."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A drawn line."""

    css: str
    path: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Bar:
    """A drawn bar."""

    x: float
    y: float
    width: float
    height: float
    css: str
    text: str


@dataclass(frozen=True)
class Plot:
    """A chart at one width."""

    css: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    limits: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A chart with its title, legend, summary and table.

    Attributes:
        name: Unique on its page; letters and hyphens.
        title: Title of the chart.
        summary: Text alternative for screen readers.
        legend: Names and classes of the series.
        limits: Names of the lines across.
        columns: Headings of its table.
        rows: Rows of its table.
    """

    name: str
    title: str
    summary: str
    x_label: str
    y_label: str
    legend: Sequence[tuple[str, str]]
    plots: Sequence[Plot]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    limits: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A part of a bar: its name, its class and its height."""

    name: str
    css: str
    value: float


LADDER: Final = (
    *((0.001, "1 ms"), (0.01, "10 ms"), (0.1, "100 ms"), (1.0, "1 s"), (10.0, "10 s")),
    *((60.0, "1 min"), (600.0, "10 min"), (3600.0, "1 h"), (36_000.0, "10 h")),
    *((345_600.0, "4 d"), (3_456_000.0, "40 d")),
)
"""Rungs of a logarithmic scale of time, in seconds: about a factor of ten apart, at values that people say."""
SMALL: Final = (150, 40)
"""Width and height of a small line."""

TINY: Final = 1e-280
"""Smallest usable range; the powers of ten of a smaller one would underflow a float."""


@dataclass(frozen=True)
class Scale:
    """Maps values to positions."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        width = self.high - self.low or 1.0
        return round(self.start + (value - self.low) / width * (self.end - self.start), 1)


def steps(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about `count` round values that cover a range, 1, 2 or 5 times a power of ten apart."""
    if high - low < max(abs(low), abs(high), TINY) * 1e-12:
        room = max(abs(low), abs(high)) / 10
        room = room if room > TINY else 1.0
        low, high = low - room, high + room
    width = high - low
    raw = width / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    step = max(1.0, step) if whole else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    written: Callable[[float], str],
    sizes: Mapping[str, Size] = SIZES,
    limits: Sequence[Limit] = (),
    is_time: bool = False,
    summary: str = "",
) -> Chart | None:
    """Return a chart of lines over whole numbers; None if there is no finite point.

    Args:
        name: Unique on its page.
        title: Title of the chart.
        series: The lines; points that are not finite are omitted.
        x_label: Label of the x axis.
        y_label: Label of the y axis, with its unit.
        written: Formats a y value.
        sizes: Width and height of each drawing, by its CSS class.
        limits: Values of y that are drawn as lines across.
        is_time: Whether y is seconds, drawn on a logarithmic scale so that short times are seen beside long ones.
        summary: In words; empty means range and ends of each line.
    """
    shown = [item for item in map(_finite, series) if item.points]
    if not shown:
        return None
    xs = sorted({x for item in shown for x, _ in item.points})
    return Chart(
        name,
        title,
        summary
        or " ".join([*(_in_words(item, x_label, written) for item in shown), *_stated(limits)]),
        x_label,
        y_label,
        [(item.name, item.css) for item in shown],
        [
            _line_plot(css, size, shown, written, limits, is_time=is_time)
            for css, size in sizes.items()
        ],
        [x_label, *(item.name for item in shown)],
        list(_rows(xs, shown, written)),
        [item.name for item in limits],
    )


def small_lines(
    series: Sequence[Series], together: Series, written: Callable[[float], str]
) -> list[SmallLine]:
    """Return lines to be compared, all on one scale, each before the line of all together."""
    shown = [item for item in map(_finite, series) if item.points]
    if not shown:
        return []
    behind = _finite(together)
    points = [point for item in [*shown, behind] for point in item.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    width, height = SMALL
    across = Scale(min(xs), max(xs), 3, width - 5)
    up = Scale(min(ys), max(ys), height - 5, 5)
    return [
        SmallLine(
            item.name,
            written(item.points[-1][1]),
            _in_words(item, "Version", written),
            _path(item.points, across, up),
            _path(behind.points, across, up) if behind.points else "",
            (across(item.points[-1][0]), up(item.points[-1][1])),
        )
        for item in shown
    ]


def bar_chart(
    name: str,
    title: str,
    summary: str,
    bars: Sequence[tuple[int | str, Sequence[Part]]],
    *,
    x_label: str,
    y_label: str,
    written: Callable[[float], str],
    compact_count: int = 15,
) -> Chart | None:
    """Return a chart of stacked bars over numbers or names; None if there are no bars.

    Args:
        name: Unique on its page.
        title: Title of the chart.
        summary: Text alternative.
        bars: Number or name of each bar, and its parts; parts below 0 are not drawn.
        x_label: Label of the x axis.
        y_label: Label of the y axis, with its unit.
        written: Formats the height of a part.
        compact_count: Number of bars, the last ones, in the drawing for narrow screens.
    """
    if not bars:
        return None
    legend = {part.name: part.css for _, parts in bars for part in parts}
    rows = [
        [str(number), *(_value(parts, part, written) for part in legend)] for number, parts in bars
    ]
    return Chart(
        name,
        title,
        summary,
        x_label,
        y_label,
        list(legend.items()),
        [
            _bar_plot("wide", WIDE, bars, x_label, written),
            _bar_plot("compact", COMPACT, bars[-compact_count:], x_label, written),
        ],
        [x_label, *legend],
        rows,
    )


def _finite(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if math.isfinite(y)]
    return Series(series.name, series.css, points)


def _path(points: Sequence[Point], across: Position, up: Position) -> str:
    return "M" + "L".join(f"{across(x):g} {up(y):g}" for x, y in points)


def _frame(size: Size) -> tuple[float, float, float, float]:
    width, height = size
    return LEFT, width - RIGHT, TOP, height - BOTTOM


def _line_plot(
    css: str,
    size: Size,
    series: Sequence[Series],
    written: Callable[[float], str],
    limits: Sequence[Limit],
    *,
    is_time: bool,
) -> Plot:
    left, right, top, bottom = _frame(size)
    xs = [x for item in series for x, _ in item.points]
    values = [y for item in series for _, y in item.points] + [item.value for item in limits]
    room = 0 if min(xs) < max(xs) else 1
    across = Scale(min(xs) - room, max(xs) + room, left, right)
    up, y_ticks = (_time_axis if is_time else _even_axis)(values, bottom, top)
    lines = [
        Line(
            item.css,
            _path(item.points, across, up),
            [Mark(across(x), up(y), f"{item.name} {written(y)} at {x:g}") for x, y in item.points]
            if len(item.points) <= MARKED_POINTS
            else (),
        )
        for item in series
    ]
    return Plot(
        css,
        *size,
        left,
        right,
        top,
        bottom,
        [
            Tick(across(x), f"{x:g}")
            for x in steps(min(xs), max(xs), 5 if css in NARROW else 8, whole=True)
            if min(xs) <= x <= max(xs)
        ],
        y_ticks,
        lines,
        limits=[up(item.value) for item in limits],
    )


def _even_axis(
    values: Sequence[float], bottom: float, top: float
) -> tuple[Position, Sequence[Tick]]:
    """Return the positions of values, and round marks; whole ones for counts."""
    whole = all(float(value).is_integer() for value in values)
    rungs = steps(min(values), max(values), TICKS, whole=whole)
    up = Scale(rungs[0], rungs[-1], bottom, top)
    return up, [Tick(up(y), _rung(y, rungs)) for y in rungs]


def _time_axis(
    values: Sequence[float], bottom: float, top: float
) -> tuple[Position, Sequence[Tick]]:
    """Return the positions of times in seconds on a logarithmic scale, and marks that people say."""
    shortest, longest = LADDER[0][0], LADDER[-1][0]
    low = max([at for at, _ in LADDER if at <= min(values)], default=shortest)
    high = min([at for at, _ in LADDER if at >= max(values)], default=longest)
    if low == high:
        high = min([at for at, _ in LADDER if at > low], default=longest * 10)
    scale = Scale(math.log10(low), math.log10(high), bottom, top)

    def up(seconds: float) -> float:
        return scale(math.log10(min(max(seconds, low), high)))

    return up, [Tick(up(at), label) for at, label in LADDER if low <= at <= high]


def _stated(limits: Sequence[Limit]) -> list[str]:
    return [f"{item.name[:1].upper()}{item.name[1:]}." for item in limits]


def _bar_plot(
    css: str,
    size: Size,
    bars: Sequence[tuple[int | str, Sequence[Part]]],
    x_label: str,
    written: Callable[[float], str],
) -> Plot:
    left, right, top, bottom = _frame(size)
    highest = max(sum(max(part.value, 0.0) for part in parts) for _, parts in bars)
    whole = all(float(part.value).is_integer() for _, parts in bars for part in parts)
    rungs = steps(0.0, highest or 1.0, TICKS, whole=whole)
    up = Scale(rungs[0], rungs[-1], bottom, top)
    pitch = (right - left) / max(len(bars), 6)
    every = max(1, math.ceil(len(bars) / (6 if css in NARROW else 12)))
    drawn: list[Bar] = []
    ticks: list[Tick] = []
    for index, (number, parts) in enumerate(bars):
        x = left + index * pitch + pitch * 0.18
        if index % every == 0:
            ticks.append(Tick(round(x + pitch * 0.32, 1), str(number)))
        floor = 0.0
        for part in parts:
            if part.value <= 0:
                continue
            y, base = up(floor + part.value), up(floor)
            text = f"{x_label} {number}: {part.name.lower()} {written(part.value)}"
            drawn.append(
                Bar(
                    round(x, 1),
                    y,
                    round(pitch * 0.64, 1),
                    round(max(base - y, 0.6), 1),
                    part.css,
                    text,
                )
            )
            floor += part.value
    return Plot(
        css,
        *size,
        left,
        right,
        top,
        bottom,
        ticks,
        [Tick(up(y), _rung(y, rungs)) for y in rungs],
        bars=drawn,
    )


def _rung(value: float, rungs: Sequence[float]) -> str:
    """Return the label of a tick, with the fewest decimals that tell the ticks apart."""
    step = rungs[1] - rungs[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{min(decimals, 6)}f}"


def _in_words(series: Series, x_label: str, written: Callable[[float], str]) -> str:
    (first_x, first), (last_x, last) = series.points[0], series.points[-1]
    where = x_label.lower()
    if len(series.points) == 1:
        return f"{series.name}: {written(first)} at {where} {first_x:g}."
    low, high = min(y for _, y in series.points), max(y for _, y in series.points)
    return (
        f"{series.name}: from {written(first)} at {where} {first_x:g} to {written(last)} at {where} {last_x:g};"
        f" lowest {written(low)}, highest {written(high)}."
    )


def _rows(
    xs: Sequence[float], series: Sequence[Series], written: Callable[[float], str]
) -> Iterator[list[str]]:
    found = [dict(item.points) for item in series]
    for x in xs:
        yield [f"{x:g}", *(written(points[x]) if x in points else NONE for points in found)]


def _value(parts: Sequence[Part], name: str, written: Callable[[float], str]) -> str:
    return next((written(part.value) for part in parts if part.name == name), NONE)
