"""The witness file: every signed head of the audit log, one line each (`qflare.evidence.checkpoints`), append-only.

Keep it where an attacker with write access to the database cannot reach it: on another machine, or copied by
another account.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from qflare.evidence.checkpoints import checkpoint_line, parse_checkpoint_line
from qflare.v1 import security_pb2


def append(path: Path, envelope: security_pb2.SignedEnvelope) -> None:
    """Append a head durably in one write, so that lines of concurrent writers do not interleave.

    Raises:
        OSError: It cannot be written.
    """
    line = checkpoint_line(envelope).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: line written in part")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[security_pb2.SignedEnvelope]:
    """Yield the heads of a witness file in order; the caller verifies their signatures.

    Raises:
        OSError: It cannot be read.
        StatementError: A line is not a tree head.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield parse_checkpoint_line(line)
