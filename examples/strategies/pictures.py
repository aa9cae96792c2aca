"""Pictures of the comparison: accuracy by round, over time, and by epsilon."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from experiments import ALPHAS, ATTACKS, RULES, TARGET
from rhythm import Timeline

mpl.use("Agg")
from matplotlib import pyplot as plt

DOTS_PER_INCH = 110
TITLES = {
    "none": "all devices honest",
    "label flip": "4 of 20 flip labels",
    "sign flip": "4 of 20 flip signs",
}
ROBUST = ("median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan")
COLORS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined] # defined at run time
Curves = Mapping[tuple[str, float, str], Sequence[float]]


def draw_rules(curves: Curves, alpha: float, path: Path) -> None:
    """Draw the accuracy by round of every rule, with one panel per attack."""
    figure, axes = plt.subplots(1, len(ATTACKS), figsize=(13, 4.4), sharey=True)
    for axis, attack in zip(axes, ATTACKS, strict=True):
        for index, rule in enumerate(RULES):
            accuracies = curves[rule, alpha, attack]
            style = "-" if rule in ROBUST else "--"
            rounds = range(1, len(accuracies) + 1)
            axis.plot(rounds, accuracies, style, label=rule, color=COLORS[index], linewidth=1.6)
        axis.set(title=TITLES[attack], xlabel="round", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on test examples")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(f"20 devices, Dirichlet({alpha:g})", fontsize=11)
    _save(figure, path)


def draw_rhythm(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw accuracy over simulated time."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for name, timeline in timelines.items():
        axis.plot([at for at, _ in timeline], [accuracy for _, accuracy in timeline], label=name)
    axis.axhline(TARGET, color="gray", linewidth=0.8, linestyle=":")
    axis.set(
        title="20 devices, every third five times slower",
        xlabel="simulated time (trainings of a fast device)",
        ylabel="accuracy on test examples",
        ylim=(0, 1),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_privacy(
    points: Mapping[int, Sequence[tuple[float, float]]], without: Mapping[int, float], path: Path
) -> None:
    """Draw accuracy against epsilon, with one line per number of devices."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for device_count, line in points.items():
        (drawn,) = axis.plot(
            *zip(*sorted(line), strict=True), "o-", label=f"{device_count} devices"
        )
        axis.axhline(without[device_count], color=drawn.get_color(), linewidth=0.9, linestyle=":")
    axis.set(
        xscale="log",
        title="Central differential privacy (dotted: clipped, without noise)",
        xlabel="epsilon after the last round",
        ylabel="accuracy on test examples",
        ylim=(0, 1),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    _save(figure, path)


def _save(figure: "mpl.figure.Figure", path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def names(folder: Path) -> dict[float, Path]:
    """Return the path of the picture for each Dirichlet alpha."""
    return {alpha: folder / f"strategies-dirichlet-{alpha:g}.png" for alpha in ALPHAS}
