"""Progress of a simulation on a terminal: one line, redrawn in place."""

import sys
import time
from typing import Final, TextIO

from qflare.terminal import printable

WIDTH: Final = 30
REDRAW_S: Final = 0.1


class Progress:
    """Draws the progress of a simulation, if the stream is a terminal.

    Args:
        name: Of the simulation.
        stream: Where to draw.
    """

    def __init__(self, name: str, stream: TextIO = sys.stderr) -> None:
        self._name = printable(name)
        self._stream = stream
        self._drawn_at = 0.0

    def __call__(self, version: int, rounds: int, accepted: int, target: int) -> None:
        """Draw the published versions and the updates of the open round, at most ten times a second."""
        if not self._stream.isatty() or time.monotonic() - self._drawn_at < REDRAW_S:
            return
        self._drawn_at = time.monotonic()
        full = WIDTH * max(0, version) // max(1, rounds)
        line = (
            f"{self._name} [{'=' * full:<{WIDTH}}] {version}/{rounds}, {accepted}/{target} updates"
        )
        self._stream.write(f"\r{line:<100}")
        self._stream.flush()

    def close(self) -> None:
        """Erase the line."""
        if self._stream.isatty() and self._drawn_at:
            self._stream.write("\r" + " " * 100 + "\r")
            self._stream.flush()
