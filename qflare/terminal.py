r"""Terminal output with control characters escaped, so that untrusted text cannot manipulate the terminal.

Names, reasons and errors come from devices, administrators and coordinators that may be hostile. A terminal obeys
its input: escape sequences (ESC, and C1 controls such as U+009B) move the cursor, rewrite lines that were printed and
set titles or clipboards; line breaks forge lines; bidirectional controls and invisible characters make one text look
like another. All output of the programs therefore passes through this module: by `say` and `complain`, by
`LogFormatter`, or piece by piece by `printable` where a program draws. Characters that Unicode does not call printable
(`str.isprintable`: the categories Cc, Cf, Cs, Co, Cn, Zl, Zp, and Zs but for the space) are shown as Python writes
them: ``\x1b``, ``\u202e``.

This module does not lay out tables or produce JSON, whose own escapes leave only ASCII.
"""

import logging
import os
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO


def printable(text: object) -> str:
    """Return the text of an object in one line of printable characters; others are shown as escapes."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else _escaped(char) for char in plain)


def printable_lines(text: object) -> str:
    """Return the text of an object in lines of printable characters, broken where it has line feeds."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def say(*parts: object, stream: TextIO | None = None, flush: bool = False) -> None:
    """Print objects as lines of printable characters, with spaces between them.

    Args:
        parts: Objects to print.
        stream: Output stream; None means standard output.
        flush: Flush the stream.
    """
    out = sys.stdout if stream is None else stream
    out.write(_encodable(printable_lines(" ".join(map(str, parts))), out) + "\n")
    if flush:
        out.flush()


def complain(text: object) -> None:
    """Print lines of printable characters on standard error."""
    say(text, stream=sys.stderr)


def flush_output() -> None:
    """Write what is buffered for standard output.

    Raises:
        OSError: It cannot be written.
    """
    sys.stdout.flush()


def discard_unwritten() -> None:
    """Point standard output at the null device if what is buffered cannot be written."""
    try:
        flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an uncaught exception with its traceback; install as `sys.excepthook`."""
    complain("".join(traceback.format_exception(kind, error, trace)).rstrip())


class LogFormatter(logging.Formatter):
    """Log formatter that prints printable characters only: one line for a message, more for a traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # its base names it
        """Return the line of a record."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  # its base names it
        """Return the lines of a traceback."""
        return printable_lines(super().formatException(ei))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _encodable(text: str, stream: TextIO) -> str:
    """Return text with the characters that the stream's encoding cannot represent escaped."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
