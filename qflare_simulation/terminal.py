"""Progress of a simulation: one line, redrawn in place on a terminal and in a notebook."""

import sys
import time
from typing import Any, Final, Self, TextIO

from qflare.terminal import printable

WIDTH: Final = 30
REDRAW_S: Final = 0.1


class Progress:
    """Draws the progress of a simulation; draws nothing where neither a terminal nor a notebook is.

        with Progress("digits") as progress:
            history = simulate(train, data, config, notice=progress)

    A line on a terminal is erased at the end. The output of a notebook's cell is one line that is replaced, and stays.

    Args:
        name: Of the simulation.
        stream: Where to draw, if it is a terminal.
    """

    def __init__(self, name: str, stream: TextIO = sys.stderr) -> None:
        self._name = printable(name)
        self._stream = stream
        self._notebook = None if stream.isatty() else _NotebookLine.found()
        self._drawn_at = 0.0
        self._line = ""

    def __call__(self, version: int, rounds: int, accepted: int, target: int) -> None:
        """Draw the published versions and the updates of the open round, at most ten times a second."""
        full = WIDTH * max(0, version) // max(1, rounds)
        self._line = (
            f"{self._name} [{'=' * full:<{WIDTH}}] {version}/{rounds}, {accepted}/{target} updates"
        )
        if time.monotonic() - self._drawn_at < REDRAW_S:
            return
        self._drawn_at = time.monotonic()
        if self._notebook is not None:
            self._notebook.show(self._line)
        elif self._stream.isatty():
            self._stream.write(f"\r{self._line:<100}")
            self._stream.flush()

    def close(self) -> None:
        """Erase the line of a terminal; draw the last one of a notebook."""
        if self._notebook is not None:
            if self._line:
                self._notebook.show(self._line)
        elif self._stream.isatty() and self._drawn_at:
            self._stream.write("\r" + " " * 100 + "\r")
            self._stream.flush()

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class _NotebookLine:
    """An output of the cell that runs, which is replaced in place.

    Args:
        display: Module `IPython.display`.
    """

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None

    @classmethod
    def found(cls) -> Self | None:
        """Return one if this program is the kernel of a notebook."""
        module: Any = sys.modules.get("IPython")
        shell = None if module is None else module.get_ipython()
        return cls(module.display) if hasattr(shell, "kernel") else None

    def show(self, line: str) -> None:
        """Show a line instead of the one before."""
        data = {"text/plain": line}
        if self._handle is None:
            self._handle = self._display.display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
