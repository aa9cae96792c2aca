"""Messages of webhooks: an audit entry as the JSON that a receiver gets.

A message has ids, names and numbers of its event, by a list of the fields of each type: details that an event gets
later, and texts that people wrote, such as reasons, are not sent.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare_server.storage.records import AuditLog
from qflare_server.storage.repository import training_sessions

ROUND_PUBLISHED: Final = "round.published"
SESSION_ENDED: Final = "training_session.ended"
DEVICE_QUARANTINED: Final = "device.quarantined"
BUDGET_NEARLY_SPENT: Final = "privacy.budget_nearly_spent"
TEST: Final = "webhook.test"
TYPES: Final[Mapping[str, str]] = {
    "version.published": ROUND_PUBLISHED,
    "training_session.completed": SESSION_ENDED,
    "training_session.failed": SESSION_ENDED,
    "training_session.cancelled": SESSION_ENDED,
    "device.quarantined": DEVICE_QUARANTINED,
    "privacy.budget_nearly_spent": BUDGET_NEARLY_SPENT,
}
"""Types of messages by the type of the audit entry."""
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    ROUND_PUBLISHED: ("round", "version", "contributors", "epsilon"),
    SESSION_ENDED: (),
    DEVICE_QUARANTINED: ("device_name", "rejections"),
    BUDGET_NEARLY_SPENT: ("round", "version", "epsilon", "epsilon_budget"),
}
"""Details of an audit entry that a message of each type has."""
ID_DIGITS: Final = 32


@dataclass(frozen=True)
class Message:
    """A message as it is sent; the id is the same at every attempt."""

    id: str
    type: str
    body: bytes


def event_types(wanted: tuple[str, ...]) -> frozenset[str]:
    """Return the types of the audit entries that some types of messages are made from."""
    return frozenset(event for event, kind in TYPES.items() if kind in wanted)


def message_of(session: Session, realm: str, entry: AuditLog) -> Message:
    """Return the message of an audit entry that has its place in the tree.

    The id comes from the leaf hash, which is unique even after an earlier state of the database was restored.
    """
    assert entry.leaf_hash is not None
    kind = TYPES[entry.event_type]
    data = {name: entry.details[name] for name in FIELDS[kind] if name in entry.details}
    if kind == SESSION_ENDED:
        data["state"] = entry.event_type.rpartition(".")[2]
    subject, _, subject_id = entry.subject.partition(":")
    training_session_id = str(entry.details.get("training_session", ""))
    if subject == "device":
        data["device_id"] = subject_id
    else:
        training_session_id = subject_id
    if training_session_id:
        data |= _named(session, training_session_id)
    data["audit_index"] = entry.leaf_index
    number = f"msg_{entry.leaf_hash.hex()[:ID_DIGITS]}"
    return _encode(number, kind, entry.created_at, realm, data)


def _named(session: Session, training_session_id: str) -> dict[str, str]:
    row = training_sessions.get_session(session, training_session_id)
    named = {"training_session_id": training_session_id}
    return named if row is None else {**named, "training_session_name": row.name}


def probe_message(realm: str, number: str, at: datetime) -> Message:
    """Return a message without an event, to test a receiver."""
    return _encode(f"msg_{number}", TEST, at, realm, {})


def _encode(number: str, kind: str, at: datetime, realm: str, data: Mapping[str, Any]) -> Message:
    content = {
        "id": number,
        "type": kind,
        "timestamp": at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "realm": realm,
        "data": dict(sorted(data.items())),
    }
    return Message(number, kind, json.dumps(content, ensure_ascii=False).encode())
