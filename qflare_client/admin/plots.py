"""Curves of metrics by version and results of queries, saved as PNG or SVG by matplotlib (extra `plot`)."""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Final

from qflare.analytics.results import Cell, Result
from qflare_client.admin.extras import require
from qflare_client.errors import InvalidRequestError

FORMATS: Final = frozenset({".png", ".svg"})
_MOST_TICKS: Final = 24


def save(path: Path, title: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Save one curve for each metric, one panel for each kind of metric.

    Args:
        path: Ends in .png or .svg.
        title: Title of the plot.
        series: Versions and values by metric.

    Raises:
        InvalidRequestError: The file extension is not supported, or there is nothing to plot.
        MissingExtraError: matplotlib is not installed.
    """
    _check_format(path)
    if not series:
        raise InvalidRequestError("no version has such a metric")
    figures = require("matplotlib.figure", "plot")
    panels = _panels(series)
    figure = figures.Figure(figsize=(7, 2.6 * len(panels) + 0.6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, names in zip(axes, panels.values(), strict=True):
        for name in names:
            versions, values = zip(*series[name], strict=True)
            panel.plot(versions, values, marker=".", label=name)
        panel.legend(loc="best")
        panel.grid(alpha=0.3)
    axes[-1].set_xlabel("version")
    figure.savefig(path)


def save_result(path: Path, title: str, result: Result) -> None:
    """Save the table of a query as bars: one for each row, or for each column of the only row.

    Args:
        path: Ends in .png or .svg.
        title: Title of the plot.
        result: The table.

    Raises:
        InvalidRequestError: The file extension is not supported.
        MissingExtraError: matplotlib is not installed.
    """
    _check_format(path)
    figures = require("matplotlib.figure", "plot")
    names, values = _bars(result)
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    places = range(len(values))
    axes.bar(places, [0.0 if isnan(value) else value for value in values], width=0.9)
    step = -(-len(names) // _MOST_TICKS)
    axes.set_xticks(list(places)[::step], names[::step], rotation=30, ha="right")
    axes.set_ylabel(result.columns[-1] if len(result.rows) > 1 else "value")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def _bars(result: Result) -> tuple[list[str], list[float]]:
    """Return name and height of each bar; of a histogram the counts, of labels the shares."""
    if len(result.rows) == 1:
        return list(result.columns), [float(cell) for cell in result.rows[0]]
    names = [
        _label(row[:-1]) if result.columns[0] == "from" else _label(row[:1]) for row in result.rows
    ]
    return names, [float(row[-1]) for row in result.rows]


def _label(cells: Sequence[Cell]) -> str:
    shown = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
    return " to ".join(shown)


def _check_format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise InvalidRequestError(f"{path}: want .png or .svg")


def _panels(series: Mapping[str, object]) -> dict[str, list[str]]:
    """Group the metrics by panel: train_loss shares a panel with loss."""
    panels: dict[str, list[str]] = {}
    for name in sorted(series):
        panels.setdefault(name.removeprefix("train_"), []).append(name)
    return panels
