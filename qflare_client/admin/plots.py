"""Curves of metrics by version, saved as PNG or SVG by matplotlib (extra `plot`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from qflare_client.admin.extras import require
from qflare_client.errors import InvalidRequestError

FORMATS: Final = frozenset({".png", ".svg"})


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
    if path.suffix not in FORMATS:
        raise InvalidRequestError(f"{path}: want .png or .svg")
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


def _panels(series: Mapping[str, object]) -> dict[str, list[str]]:
    """Group the metrics by panel: train_loss shares a panel with loss."""
    panels: dict[str, list[str]] = {}
    for name in sorted(series):
        panels.setdefault(name.removeprefix("train_"), []).append(name)
    return panels
