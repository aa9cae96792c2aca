"""`python -m tests.bench`: run the measurements and print their table."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.bench import (
    aggregation,
    divided,
    large_models,
    lists,
    masking,
    relayed,
    rounds,
    sealed_transfers,
    secure_peer,
    secure_rounds,
    security,
    simulation,
    small_operations,
    transfers,
)
from tests.bench.coordinator import Laboratory
from tests.bench.figures import Figure
from tests.bench.machine import describe
from tests.bench.report import facts, problem_of, render, replace_section

Measurement = Callable[[Laboratory], Iterator[Figure]]
MEASUREMENTS: dict[str, Measurement] = {
    "updates": small_operations.updates,
    "relayed-updates": relayed.relayed_updates,
    "latencies": small_operations.latencies,
    "idle-polls": small_operations.idle_polls,
    "uploads": transfers.uploads,
    "downloads": transfers.downloads,
    "crowding": transfers.crowding,
    "memory": transfers.memory,
    "closing": rounds.closing,
    "rounds": rounds.whole,
    "rounds-sdk": rounds.with_sdk,
    "rounds-stores": large_models.other_stores,
    "two-gib": large_models.huge,
    "signatures": small_operations.signatures,
    "signed-uploads": transfers.signed_uploads,
    "sealed-uploads": sealed_transfers.sealed_uploads,
    "logins": security.logins,
    "sealing": security.sealing,
    "signing": security.signing,
    "proofs": security.proofs,
    "audit-appends": security.audit_appends,
    "folding": aggregation.folding,
    "sliced": aggregation.sliced,
    "divided-rounds": divided.divided_rounds,
    "robust": aggregation.robust,
    "lists": lists.first_pages,
    "masked-devices": secure_rounds.masked_devices,
    "helper-rounds": secure_rounds.helper_rounds,
    "neighbors": masking.neighbors,
    "secure-peer": secure_peer.beside_flower,
    "secure-peer-deployed": secure_peer.beside_flower_deployed,
    "simulation": simulation.simulation,
}

FULL = frozenset({"two-gib"})
"""Measurements that run with `--full` or by name only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 if a measurement failed, 0 whatever the figures are."""
    options = _parser().parse_args(arguments)
    if options.markdown and (problem := problem_of(options.markdown, "bench")):
        sys.stderr.write(f"{problem}\n")
        return 2
    names = options.only or [name for name in MEASUREMENTS if options.full or name not in FULL]
    machine = describe()
    say(facts(machine))
    figures: list[Figure] = []
    failed = False
    with Laboratory(quick=options.quick, full=options.full) as lab:
        for name in names:
            failed |= not _run(name, lab, figures)
            if options.markdown:  # after each, so that a run that is cut short leaves what it has
                text = f"{facts(machine)}\n\n{render(figures)}"
                replace_section(options.markdown, "bench", text)
    say(f"\n{render(figures)}")
    return int(failed)


def say(text: str) -> None:
    """Print at once, for who waits."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _line(figure: Figure) -> str:
    return (
        f"  {figure.what}: {figure.measured} | {figure.ceiling} {figure.share}"
        f" | {figure.goal} {figure.verdict} (load {figure.load:.1f}, stolen {figure.stolen:.0%})"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=MEASUREMENTS, help="run this one; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, to try it out")
    parser.add_argument(
        "--full", action="store_true", help="sizes that need 12 GB of disk and many minutes"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        help="also write the table into this file, such as docs/benchmarks.md",
    )
    return parser


def _run(name: str, lab: Laboratory, figures: list[Figure]) -> bool:
    """Run one measurement; a failure is shown and costs its rows only."""
    begun = time.monotonic()
    say(f"\n{name} ...")
    try:
        for figure in MEASUREMENTS[name](lab):
            figures.append(figure)
            say(_line(figure))
    except Exception:  # noqa: BLE001 - shown, and the others go on
        traceback.print_exc()
        figures.append(Figure(name, "failed"))
        return False
    say(f"  {time.monotonic() - begun:.0f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
