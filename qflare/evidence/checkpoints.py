"""Audit log checkpoints for witnesses: tree heads as lines of an append-only text file.

::

    line = origin SP size SP root SP time SP envelope LF

Origin is the log's name, size its number of entries in decimal, root the Merkle root and envelope
the signed ``TreeHead``, serialized, both in base64 (RFC 4648 section 4), time RFC 3339 in UTC. The
first three are those of a C2SP tlog-checkpoint; people compare them. Programs verify the envelope,
which alone is authoritative.

A file of such lines, kept where the operator of the log cannot rewrite it, detects replacement of the
whole log: every later head must be consistent with every line.
"""

import base64
import binascii
from datetime import UTC, datetime

from google.protobuf.message import DecodeError

from qflare.evidence.statements import StatementError
from qflare.v1 import security_pb2


def checkpoint_line(envelope: security_pb2.SignedEnvelope) -> str:
    """Write a signed head as a line, its line feed included.

    Raises:
        StatementError: The payload is not a tree head.
    """
    return " ".join([*_facts(envelope), _text(envelope.SerializeToString())]) + "\n"


def parse_checkpoint_line(line: str) -> security_pb2.SignedEnvelope:
    """Read a line; its signature is not checked here (`qflare.evidence.statements.open_tree_head`).

    Raises:
        StatementError: The line is malformed, or its text contradicts its envelope.
    """
    *facts, encoded = line.rstrip("\n").split(" ")
    try:
        data = base64.b64decode(encoded, validate=True)
        envelope = security_pb2.SignedEnvelope.FromString(data)
    except (binascii.Error, DecodeError, ValueError) as error:
        raise StatementError("checkpoint line holds no envelope") from error
    if facts != _facts(envelope):
        raise StatementError("checkpoint line does not say what its envelope says")
    return envelope


def _facts(envelope: security_pb2.SignedEnvelope) -> list[str]:
    try:
        head = security_pb2.TreeHead.FromString(envelope.payload)
        root = bytes.fromhex(head.root_digest)
        at = head.create_time.ToDatetime(tzinfo=UTC)
    except (DecodeError, ValueError) as error:
        raise StatementError("checkpoint is no head of a log") from error
    return [head.origin, str(head.size), _text(root), _time(at)]


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
