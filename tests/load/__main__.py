"""`python -m tests.load`: load a coordinator with ghz on both databases and print one table."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.figures import per_second, percent, table
from tests.bench.machine import describe
from tests.bench.process import ServerProcess
from tests.bench.report import facts, problem_of, replace_section
from tests.load import data, runner

HEADS = (
    "call",
    "database",
    "requests",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "errors",
    "no-op server",
    "share",
    "goal",
    "reached",
)


@dataclass(frozen=True)
class Scenario:
    """One configuration of ghz with its data and its goals.

    Attributes:
        name: Of the configuration in `ghz/`.
        what: Name of the call for people.
        prepare: Makes the data.
        total: Number of calls.
        rate_goal: Calls per second that a machine of two cores has to do.
        p99_goal_ms: Latency that 99 of 100 calls have to stay within at that load, in milliseconds.
        share_goal: Instead of a rate, the share of the no-op server's, where ghz is what costs most: it takes in the
            payload as JSON for each call.
    """

    name: str
    what: str
    prepare: Callable[[Coordinator, Path, int], data.Prepared]
    total: int
    rate_goal: float
    p99_goal_ms: float
    share_goal: float = 0.0

    @property
    def goal(self) -> str:
        """The goals as text."""
        wanted = (
            f"{percent(self.share_goal)} of no-op" if self.share_goal else f"{self.rate_goal:.0f}/s"
        )
        return f">= {wanted}, p99 < {self.p99_goal_ms:.0f} ms"


SCENARIOS = (
    Scenario("register", "Register (8 at once)", data.register, 300, 100, 200),
    Scenario("authenticate", "Authenticate (8)", data.authenticate, 300, 200, 100),
    Scenario("get-task", "GetTask, idle (16)", data.get_task, 4000, 1000, 50),
    Scenario("submit-10kb", "SubmitUpdate, 10 KB (16)", data.submit_10_kb, 900, 250, 100),
    Scenario("submit-1mb", "SubmitUpdate, 1 MB (4)", data.submit_1_mb, 200, 0, 250, 0.5),
    Scenario("get-model", "GetGlobalModel, 1 MB (4)", data.get_model, 600, 100, 100),
    Scenario("list-devices", "ListDevices (4)", data.list_devices, 400, 100, 100),
    Scenario("list-audit", "ListAuditEntries (4)", data.list_audit, 400, 100, 100),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios; 1 if a call failed or ghz is missing, 0 whatever the figures are."""
    options = _parser().parse_args(arguments)
    if options.markdown and (problem := problem_of(options.markdown, "load")):
        sys.stderr.write(f"{problem}\n")
        return 2
    try:
        runner.find()
    except runner.GhzMissingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    machine = facts(describe())
    sys.stdout.write(f"{machine}\n\n")
    rows, error_count = [], 0
    with Laboratory() as lab, _folder(lab, options.keep) as folder, lab.sink() as sink:
        for backend in Backend:
            with lab.coordinator(backend) as coordinator:
                for scenario in _chosen(options.only):
                    row, errors = _run(scenario, backend, coordinator, sink, folder)
                    rows.append(row)
                    error_count += errors
                    sys.stdout.write(f"{' | '.join(row)}\n")
                    sys.stdout.flush()
                    if options.markdown:  # after each: a run that is cut short leaves what it has
                        text = f"{machine}\n\n{table(rows, HEADS)}"
                        replace_section(options.markdown, "load", text)
    sys.stdout.write(f"\n{table(rows, HEADS)}\n")
    return int(error_count > 0)


def _parser() -> argparse.ArgumentParser:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--only", action="append", choices=names, help="run this; may be repeated")
    parser.add_argument("--keep", type=Path, help="leave data and reports in this folder")
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
    return parser


def _chosen(names: Sequence[str] | None) -> list[Scenario]:
    return [scenario for scenario in SCENARIOS if names is None or scenario.name in names]


@contextlib.contextmanager
def _folder(lab: Laboratory, kept: Path | None) -> Iterator[Path]:
    """Give the folder for data and reports."""
    if kept is None:
        with lab.temporary() as folder:
            yield folder
    else:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()


def _run(
    scenario: Scenario,
    backend: Backend,
    coordinator: Coordinator,
    sink: ServerProcess,
    folder: Path,
) -> tuple[Sequence[str], int]:
    """Run one scenario and return its row and the number of failed calls."""
    coordinator.process.settle()
    prepared = scenario.prepare(coordinator, folder, scenario.total)
    label = f"{scenario.name}-{backend.lower()}"
    report = runner.run(
        scenario.name, coordinator.address, folder, prepared.total, prepared.environment, label
    )
    bound = runner.run(
        scenario.name, sink.address, folder, prepared.total, prepared.environment, f"{label}-no-op"
    )
    for message, count in report.errors.items():
        sys.stderr.write(f"{label}: {count} x {message}\n")
    p99_ms = report.quantiles_ms.get(99, float("inf"))
    reached = (
        report.rate >= max(scenario.rate_goal, scenario.share_goal * bound.rate)
        and p99_ms < scenario.p99_goal_ms
        and not report.error_count
    )
    row = (
        scenario.what,
        backend.value,
        per_second(report.rate),
        *(f"{report.quantiles_ms.get(share, float('nan')):.1f}" for share in (50, 95, 99)),
        str(report.error_count),
        per_second(bound.rate),
        percent(report.rate / bound.rate),
        scenario.goal,
        "yes" if reached else "no",
    )
    return row, report.error_count


if __name__ == "__main__":
    sys.exit(main())
