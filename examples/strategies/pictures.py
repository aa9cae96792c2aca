"""Pictures of the comparison: accuracy by round with one panel per rule, over time, and by epsilon."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import ALPHAS, ATTACKS, DEVICE_COUNT, HOSTILE_COUNT, RULES, SIMULATED_TIME, TARGET
from matplotlib import pyplot as plt
from plots import BLUE, FAINT, ORANGE, RED, SOFT, name_ends, percent, save
from rhythm import Timeline, time_to

LOOKS = {
    "none": ("all devices honest", BLUE),
    "label flip": (f"{HOSTILE_COUNT} of {DEVICE_COUNT} flip labels", ORANGE),
    "sign flip": (f"{HOSTILE_COUNT} of {DEVICE_COUNT} flip signs", RED),
}
ROBUST = ("median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan")
COLUMNS = 7
Curves = Mapping[tuple[str, float, str], Sequence[float]]


def draw_rules(curves: Curves, alpha: float, path: Path) -> None:
    """Draw the accuracy by round with one panel per rule, before all other rules in gray."""
    means = [rule for rule in RULES if rule not in ROBUST]
    figure, axes = plt.subplots(2, COLUMNS, figsize=(14, 5.4), sharex=True, sharey=True)
    for row, rules in zip(axes, (means, ROBUST), strict=True):
        for axis, rule in zip(row, rules, strict=False):
            _draw_rule(axis, curves, rule, alpha)
        row[0].set_ylabel("accuracy on test examples")
    for axis in axes[1]:
        axis.set_xlabel("round")
    _draw_key(axes[1][-1])
    axes[0][-1].tick_params(labelbottom=True)
    figure.suptitle(_finding(curves, alpha, means), x=0.01, ha="left")
    save(figure, path)


def _draw_rule(axis: Any, curves: Curves, rule: str, alpha: float) -> None:
    """Draw one rule with honest and hostile devices."""
    for attack in ATTACKS:
        for other in RULES:
            line = curves[other, alpha, attack]
            axis.plot(range(1, len(line) + 1), line, color=FAINT, linewidth=0.6, zorder=1)
    ends = []
    for attack in ATTACKS:
        line, color = curves[rule, alpha, attack], LOOKS[attack][1]
        axis.plot(range(1, len(line) + 1), line, color=color)
        ends.append((len(line), line[-1], percent(line[-1]), color))
    name_ends(axis, ends, 0.085)
    axis.set(title=rule, ylim=(0, 1), xlim=(1, None), xticks=[1, 25, 50])
    axis.yaxis.set_major_formatter(lambda value, _: percent(value))


def _draw_key(axis: Any) -> None:
    """Say what the colors are, in an empty panel."""
    axis.set_axis_off()
    texts = [*LOOKS.values(), ("the other rules", SOFT)]
    for line, (text, color) in enumerate(texts):
        axis.text(0.02, 0.86 - 0.14 * line, text, color=color, transform=axis.transAxes)


def _finding(curves: Curves, alpha: float, means: Sequence[str]) -> str:
    """Return in words how means and robust rules end with devices that flip signs."""
    ends = {rule: curves[rule, alpha, "sign flip"][-1] for rule in RULES}
    plain = _range([ends[rule] for rule in means if "clip" not in rule])
    others = _range([ends[rule] for rule in RULES if rule not in means or "clip" in rule])
    return (
        f"Dirichlet({alpha:g}): with {HOSTILE_COUNT} of {DEVICE_COUNT} devices flipping signs, means end at {plain}, "
        f"rules that clip or filter at {others}"
    )


def _range(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.0f} to {percent(max(shares))}"


def draw_rhythm(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw accuracy over simulated time with one panel per rhythm, before the others in gray."""
    figure, axes = plt.subplots(1, len(timelines), figsize=(14, 3.3), sharex=True, sharey=True)
    reached = {name: time_to(line, TARGET) for name, line in timelines.items()}
    for axis, name in zip(axes, timelines, strict=True):
        for other in timelines.values():
            axis.plot(*zip(*other, strict=True), color=FAINT, linewidth=0.8, zorder=1)
        axis.plot(*zip(*timelines[name], strict=True), color=BLUE, linewidth=1.4)
        axis.axhline(TARGET, color=SOFT, linewidth=0.9, linestyle=":")
        _mark_target(axis, reached[name])
        axis.set(title=name, xlabel="simulated time", ylim=(0, 1), xlim=(0, None))
        axis.yaxis.set_major_formatter(lambda value, _: percent(value))
    axes[0].set_ylabel("accuracy on test examples")
    figure.suptitle(_ahead(reached), x=0.01, ha="left")
    save(figure, path)


def _mark_target(axis: Any, at: float | None) -> None:
    """Mark where a line reaches the target."""
    if at is None:
        axis.text(0.97, 0.06, "not reached", ha="right", color=BLUE, transform=axis.transAxes)
        return
    axis.plot([at, at], [0, TARGET], color=BLUE, linewidth=0.9, linestyle=":")
    axis.plot([at], [TARGET], "o", color=BLUE, markersize=5)
    side, gap = ("right", -5) if at > SIMULATED_TIME / 2 else ("left", 5)
    text = f"{percent(TARGET)} at {at:.0f}"
    axis.annotate(text, (at, 0.05), (gap, 0), textcoords="offset points", ha=side, color=BLUE)


def _ahead(reached: Mapping[str, float | None]) -> str:
    """Return in words which rhythm is first at the target and which last."""
    times = sorted((np.inf if at is None else at, name) for name, at in reached.items())
    (first, winner), (last, loser) = times[0], times[-1]
    behind = f"{last:.0f}" if np.isfinite(last) else "never"
    return (
        f"Every third device is five times slower. Time to {percent(TARGET)}, in trainings of a fast device: "
        f"{first:.0f} ({winner}) to {behind} ({loser})"
    )


def draw_privacy(
    points: Mapping[int, Sequence[tuple[float, float]]], without: Mapping[int, float], path: Path
) -> None:
    """Draw accuracy against epsilon, with one line per number of devices."""
    figure, axis = plt.subplots(figsize=(9, 4.4))
    looks = dict(zip(points, (ORANGE, BLUE), strict=True))
    ends = []
    for device_count, color in looks.items():
        line = sorted(points[device_count])
        axis.plot(*zip(*line, strict=True), "o-", color=color, markersize=4)
        axis.axhline(without[device_count], color=color, linewidth=0.9, linestyle=":", xmax=0.95)
        ends.append((line[-1][0], line[-1][1], f"{device_count} devices", color))
    axis.set(
        xscale="log",
        title=_price(points),
        xlabel="epsilon after the last round (dotted: clipped, without noise)",
        ylabel="accuracy on test examples",
        ylim=(0, 1),
    )
    shown = sorted(epsilon for epsilon, _ in points[min(points)])
    axis.set_xticks(shown, [f"{epsilon:.2g}" for epsilon in shown])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(lambda value, _: percent(value))
    name_ends(axis, ends, 0.065)
    save(figure, path)


def _price(points: Mapping[int, Sequence[tuple[float, float]]]) -> str:
    """Return in words the accuracies at the epsilon closest to 3."""
    few, many = min(points), max(points)
    place = min(range(len(points[few])), key=lambda at: abs(points[few][at][0] - 3))
    epsilon = points[few][place][0]
    shares = [percent(points[count][place][1]) for count in (many, few)]
    return f"Privacy needs many devices: at epsilon {epsilon:.1f}, {many} reach {shares[0]}, {few} reach {shares[1]}"


def names(folder: Path) -> dict[float, Path]:
    """Return the path of the picture for each Dirichlet alpha."""
    return {alpha: folder / f"strategies-dirichlet-{alpha:g}.png" for alpha in ALPHAS}
