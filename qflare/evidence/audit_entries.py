"""Leaf encoding of audit log entries: the exact bytes hashed into the Merkle tree.

::

    leaf hash  = SHA-256(0x00 || entry)
    entry      = "QFAE" || 0x01 || audit_id (8) || time (8, signed, microseconds since 1970 UTC)
                 || risk (1) || text(event_type) || text(authentication_method) || commitment (32)
    commitment = tagged_hash("qflare/v1/audit", salt, actor, subject, peer_address,
                             name of each detail, its text, ...)
    text(x)    = length of x in bytes (2) || x in UTF-8

Numbers are big-endian and unsigned unless said otherwise; risk is 1 low, 2 medium, 3 high, 4 critical;
details come in the order of their names' UTF-8 bytes; `tagged_hash` is that of `qflare.crypto.signing`.

Actor, subject, peer address and details are covered by the commitment only, so a leaf and its proofs
disclose no names or addresses. The salt of 16 random bytes prevents guessing attacks on the commitment.
To prove an entry to someone, disclose it with its salt. Once the salt is erased, the entry stays in the
tree but its content can no longer be recovered or proven.

This module does not store entries or make proofs; `qflare.crypto.merkle` makes the proofs.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from qflare.crypto import merkle
from qflare.crypto.signing import tagged_hash

SALT_BYTES: Final = 16
"""Length of the random value that blinds an entry's commitment."""

RISKS: Final = ("low", "medium", "high", "critical")
"""Risk levels by rising number, from 1."""

_MAGIC: Final = b"QFAE\x01"
_HEAD: Final = struct.Struct(">QqB")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class InvalidEntryError(ValueError):
    """An entry cannot be logged: a field is out of range."""


@dataclass(frozen=True)
class Entry:
    """One audit event in plaintext.

    Attributes:
        audit_id: Number of the entry, >= 0.
        event_type: Kind of event.
        actor: Identity that performed the action.
        subject: Object of the action.
        peer_address: Address of the caller.
        authentication_method: How the caller authenticated.
        risk_level: One of `RISKS`.
        details: Texts by name, see `detail_texts`.
        created_at: Time of the event, timezone-aware, with microsecond precision.
        salt: `SALT_BYTES` random bytes.
    """

    audit_id: int
    event_type: str
    actor: str
    subject: str
    peer_address: str
    authentication_method: str
    risk_level: str
    created_at: datetime
    salt: bytes = field(repr=False)
    details: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Content of the entry's leaf.

        Raises:
            InvalidEntryError: A field is out of range.
        """
        try:
            head = _HEAD.pack(self.audit_id, _microseconds(self.created_at), self._risk())
        except (struct.error, TypeError) as error:
            raise InvalidEntryError("audit entry has a number out of range") from error
        return (
            _MAGIC
            + head
            + _text(self.event_type)
            + _text(self.authentication_method)
            + self._commitment()
        )

    def leaf_hash(self) -> bytes:
        """Hash of the entry's leaf, 32 bytes.

        Raises:
            InvalidEntryError: A field is out of range.
        """
        return merkle.leaf_hash(self.to_bytes())

    def _risk(self) -> int:
        if self.risk_level not in RISKS:
            raise InvalidEntryError(
                "audit entry has an unknown risk level; if a later release made it, upgrade qflare"
            )
        return RISKS.index(self.risk_level) + 1

    def _commitment(self) -> bytes:
        if len(self.salt) != SALT_BYTES:
            raise InvalidEntryError(f"salt has {len(self.salt)} bytes, want {SALT_BYTES}")
        named = sorted((name.encode(), text.encode()) for name, text in self.details.items())
        return tagged_hash(
            "qflare/v1/audit",
            bytes(self.salt),
            self.actor.encode(),
            self.subject.encode(),
            self.peer_address.encode(),
            *(part for pair in named for part in pair),
        )


def detail_texts(details: Mapping[str, Any]) -> dict[str, str]:
    """Details as texts: strings as they are, everything else as JSON.

    JSON is written with sorted names, without spaces, every character beyond ASCII escaped.
    """
    return {
        name: value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True, separators=(",", ":"))
        for name, value in details.items()
    }


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _text(value: str) -> bytes:
    data = value.encode()
    try:
        return struct.pack(">H", len(data)) + data
    except struct.error as error:
        raise InvalidEntryError("audit entry has a text that is too long") from error
