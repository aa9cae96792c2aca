"""Compare the strategies on handwritten digits (`make strategies`).

Trains the same small network with every rule and with honest and hostile devices, with rounds and with a buffer when
some devices are slow, and with central differential privacy. Uses the coordinator's strategies without a coordinator or
a network, so a run takes a few minutes on two cores. Draws the pictures and writes the measured part of
`docs/strategies.md`.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from experiments import (
    ALPHAS,
    ATTACKS,
    BUFFER_SIZES,
    DEVICE_COUNT,
    NOISES,
    PRIVATE_DEVICE_COUNTS,
    PRIVATE_ROUND_COUNT,
    ROUND_COUNT,
    RULES,
    TARGET,
    privacy_run,
    rhythm_run,
    rule_run,
)
from pictures import Curves, draw_privacy, draw_rhythm, draw_rules, names
from rhythm import Timeline, time_to

from qflare.processors import usable_processor_count

T = TypeVar("T")
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
FAST_COUNT = DEVICE_COUNT - DEVICE_COUNT // 3


def main() -> None:
    """Run all experiments and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of strategies.md")
    parser.add_argument("--processes", type=int, default=usable_processor_count())
    arguments = parser.parse_args()
    images = arguments.docs / "images"
    images.mkdir(exist_ok=True)
    with ProcessPoolExecutor(arguments.processes) as pool:
        curves = run_all(pool, rule_run, _rule_cases())
        timelines = run_all(pool, rhythm_run, [(0, DEVICE_COUNT), (0, FAST_COUNT), *_buffers()])
        private = run_all(
            pool,
            privacy_run,
            [(count, noise) for count in PRIVATE_DEVICE_COUNTS for noise in NOISES],
        )
    named = {_rhythm_name(*case): timeline for case, timeline in timelines.items()}
    for alpha, path in names(images).items():
        draw_rules(curves, alpha, path)
    draw_rhythm(named, images / "strategies-rhythm.png")
    points = {
        count: [private[count, noise] for noise in NOISES if noise]
        for count in PRIVATE_DEVICE_COUNTS
    }
    without = {count: private[count, 0.0][1] for count in PRIVATE_DEVICE_COUNTS}
    draw_privacy(points, without, images / "strategies-privacy.png")
    sections = [*map(rules_table, [curves] * len(ALPHAS), ALPHAS), rhythm_table(named)]
    write(arguments.docs / "strategies.md", [*sections, privacy_table(private)])


def run_all(
    pool: ProcessPoolExecutor, run: Callable[..., T], cases: Iterable[tuple[Any, ...]]
) -> dict[tuple[Any, ...], T]:
    """Run every case; return the results by case."""
    jobs = {case: pool.submit(run, *case) for case in cases}
    results = {}
    for case, job in jobs.items():
        results[case] = job.result()
        print(run.__name__, *case, flush=True)
    return results


def _rule_cases() -> list[tuple[str, float, str]]:
    return [(rule, alpha, attack) for alpha in ALPHAS for rule in RULES for attack in ATTACKS]


def _buffers() -> list[tuple[int, int]]:
    return [(size, 0) for size in BUFFER_SIZES]


def _rhythm_name(buffer_size: int, closes_at: int) -> str:
    if buffer_size:
        return f"fedbuff, buffer of {buffer_size}"
    if closes_at == DEVICE_COUNT:
        return "fedavg, rounds wait for all"
    return f"fedavg, rounds close at {closes_at} of {DEVICE_COUNT}"


def rules_table(curves: Curves, alpha: float) -> str:
    """Return the accuracies of all rules as a table."""
    lines = [
        f"### Dirichlet({alpha:g})\n",
        f"![accuracy by round](images/strategies-dirichlet-{alpha:g}.png)\n",
        "| rule | honest | label flip | sign flip |",
        "|---|---|---|---|",
    ]
    for rule, settings in RULES.items():
        values = [f"{100 * curves[rule, alpha, attack][-1]:.1f} %" for attack in ATTACKS]
        chosen = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
        lines.append(f"| {rule}{f' ({chosen})' if chosen else ''} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def rhythm_table(timelines: Mapping[str, Timeline]) -> str:
    """Return the time to the target accuracy of each rhythm as a table."""
    lines = [
        "### Slow devices\n",
        "![accuracy over time](images/strategies-rhythm.png)\n",
        f"| rhythm | time to {100 * TARGET:.0f} % | versions | accuracy at the end |",
        "|---|---|---|---|",
    ]
    for name, timeline in timelines.items():
        reached = time_to(timeline, TARGET)
        when = "not reached" if reached is None else f"{reached:.1f}"
        lines.append(f"| {name} | {when} | {len(timeline) - 1} | {100 * timeline[-1][1]:.1f} % |")
    return "\n".join(lines) + "\n"


def privacy_table(private: Mapping[tuple[Any, ...], tuple[float, float]]) -> str:
    """Return accuracy by epsilon as a table."""
    lines = [
        "### Privacy\n",
        "![accuracy against epsilon](images/strategies-privacy.png)\n",
        "| noise multiplier | epsilon | "
        + " | ".join(f"{count} devices" for count in PRIVATE_DEVICE_COUNTS)
        + " |",
        "|---|---|" + "---|" * len(PRIVATE_DEVICE_COUNTS),
    ]
    for noise in NOISES:
        epsilon = private[PRIVATE_DEVICE_COUNTS[0], noise][0]
        shown = f"{noise:g} | {epsilon:.2f}" if noise else "none | unbounded"
        values = [f"{100 * private[count, noise][1]:.1f} %" for count in PRIVATE_DEVICE_COUNTS]
        lines.append(f"| {shown} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, sections: Sequence[str]) -> None:
    """Write the measured part between its markers."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    said = (
        f"Accuracy on 359 test examples after {ROUND_COUNT} rounds ({PRIVATE_ROUND_COUNT} under privacy); "
        "one run of each, with fixed seeds."
    )
    path.write_text(
        before + BEGIN + "\n" + "\n".join([said + "\n", *sections]) + "\n" + END + after
    )


if __name__ == "__main__":
    main()
