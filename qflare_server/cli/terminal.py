"""Terminal output: tables and progress bars."""

import getpass
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from qflare.terminal import printable
from qflare_server.storage.repository.audit import Caller

Item = TypeVar("Item")
BAR_WIDTH: Final = 30
REFERENCE: Final = "name, id, or beginning of its id (4 characters or more)"
MAX_NAME: Final = 200
"""Longest name of an operating system's user in the audit log."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns under the names of the first row; empty text without rows."""
    if not rows:
        return "none"
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    heads = [printable(name) for name in names]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    lines = [heads, *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else printable(value)


def progress(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield items; show a progress bar if standard error is a terminal."""
    shown = sys.stderr.isatty() and total > 1
    for done, item in enumerate(items, 1):
        yield item
        if shown:
            filled = BAR_WIDTH * done // total
            bar = "#" * filled + "." * (BAR_WIDTH - filled)
            sys.stderr.write(f"\r{printable(label)} [{bar}] {done}/{total} MiB")
            sys.stderr.flush()
    if shown:
        sys.stderr.write("\n")


def caller() -> Caller:
    """Return the user who runs the command, for the audit log."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return Caller(f"admin:{name[:MAX_NAME]}@local", "", "operating-system")
