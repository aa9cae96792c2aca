"""Progress bar on stderr; silent if stderr is not a terminal."""

import shutil
import sys
import time
from typing import TextIO

from qflare.terminal import printable

_WIDTH = 30
_REDRAW_S = 0.1
_MIB = 2**20


class ProgressBar:
    """A progress hook that draws one line: ``upload  [=====>    ] 12.0 / 96.0 MiB``.

    Args:
        stream: Where to draw; nothing is drawn unless it is a terminal.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._drawn_at = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Draw the progress of a transfer, at most ten times a second; the line is erased at the end."""
        if not self._stream.isatty() or total_bytes < _MIB:
            return
        if done_bytes >= total_bytes:
            self._wipe()
        elif time.monotonic() - self._drawn_at >= _REDRAW_S:
            self._drawn_at = time.monotonic()
            self._stream.write("\r" + bar(what, done_bytes, total_bytes))
            self._stream.flush()

    def _wipe(self) -> None:
        columns = shutil.get_terminal_size().columns
        self._stream.write("\r" + " " * (columns - 1) + "\r")
        self._stream.flush()


def bar(what: str, done_bytes: int, total_bytes: int) -> str:
    """Return the progress line of a transfer; `total_bytes` is above 0."""
    full = _WIDTH * done_bytes // total_bytes
    head = ("=" * full + ">" * (full < _WIDTH)).ljust(_WIDTH)
    return f"{printable(what):<9} [{head}] {done_bytes / _MIB:.1f} / {total_bytes / _MIB:.1f} MiB"
