"""Statements on device groups: membership of devices, and access of training sessions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, bindparam, delete, exists, insert, or_, select, true
from sqlalchemy.orm import Session

from qflare_server.storage.epochs import bump_rounds, bump_security
from qflare_server.storage.prepared import OneOf, PreparedStatement
from qflare_server.storage.tables import (
    Device,
    DeviceGroup,
    RoundDevice,
    TrainingSession,
    TrainingSessionGroup,
)

DEVICES = Device.__table__
DEVICE_GROUPS = DeviceGroup.__table__
SELECTED = RoundDevice.__table__
SESSIONS = TrainingSession.__table__
SESSION_GROUPS = TrainingSessionGroup.__table__


def _has_groups(training_session_id: Any) -> ColumnElement[bool]:
    return exists().where(SESSION_GROUPS.c.training_session_id == training_session_id)


def shares_group(training_session_id: Any, device_id: Any) -> ColumnElement[bool]:
    """Return the condition that a device is in a group that a training session is open to."""
    return exists().where(
        SESSION_GROUPS.c.training_session_id == training_session_id,
        DEVICE_GROUPS.c.group_name == SESSION_GROUPS.c.group_name,
        DEVICE_GROUPS.c.device_id == device_id,
    )


def is_open_to(training_session_id: Any, device_id: Any) -> ColumnElement[bool]:
    """Return the condition that a training session's groups admit a device.

    Args:
        training_session_id: Column or parameter.
        device_id: Column or parameter.
    """
    return or_(~_has_groups(training_session_id), shares_group(training_session_id, device_id))


def set_groups(session: Session, device_id: str, groups: Collection[str]) -> None:
    """Replace the groups of a device, effective on its next call."""
    bump_security(session)
    bump_rounds(session)
    session.execute(delete(DEVICE_GROUPS).where(DEVICE_GROUPS.c.device_id == device_id))
    if groups:
        session.execute(
            insert(DEVICE_GROUPS),
            [{"device_id": device_id, "group_name": group} for group in sorted(groups)],
        )


def groups_of(session: Session, device_ids: Collection[str]) -> Mapping[str, Sequence[str]]:
    """Return the groups of devices, each in alphabetical order; devices without any are left out."""
    query = select(DEVICE_GROUPS.c.device_id, DEVICE_GROUPS.c.group_name).where(
        DEVICE_GROUPS.c.device_id.in_(sorted(device_ids))
    )
    found: dict[str, list[str]] = {}
    rows = sorted((row[0], row[1]) for row in session.execute(query))  # the same on any database
    for device_id, group in rows:
        found.setdefault(device_id, []).append(group)
    return found


def insert_session_groups(
    session: Session, training_session_id: str, groups: Collection[str]
) -> None:
    """Record the groups that a new training session is open to."""
    if groups:
        session.execute(
            insert(SESSION_GROUPS),
            [
                {"training_session_id": training_session_id, "group_name": group}
                for group in sorted(groups)
            ],
        )


def session_groups(session: Session, training_session_id: str) -> Sequence[str]:
    """Return the groups that a training session is open to; none where it is open to all devices."""
    query = select(SESSION_GROUPS.c.group_name).where(
        SESSION_GROUPS.c.training_session_id == training_session_id
    )
    return sorted(session.scalars(query))


_MEMBERS: Final = PreparedStatement(
    select(DEVICE_GROUPS.c.device_id)
    .join(SESSION_GROUPS, SESSION_GROUPS.c.group_name == DEVICE_GROUPS.c.group_name)
    .where(
        SESSION_GROUPS.c.training_session_id == bindparam("session"),
        OneOf(DEVICE_GROUPS.c.device_id, "ids"),
    )
)


def members_among(
    session: Session, training_session_id: str, device_ids: Sequence[str]
) -> set[str]:
    """Return which of these devices are in a group that a training session is open to."""
    parameters = {"session": training_session_id, "ids": list(device_ids)}
    return {row[0] for row in _MEMBERS.rows(session, parameters)}


@dataclass(frozen=True)
class Standing:
    """Relation of a device to a training session, as stored."""

    config: Mapping[str, Any]
    started_at: datetime | None
    device_type: str
    capabilities: Mapping[str, Any]
    confirmed_at: datetime | None
    in_groups: bool
    """The training session is open to all devices, or to a group of this one."""
    was_selected: bool
    """The device was selected for a round."""


_STANDING: Final = (
    select(
        SESSIONS.c.config,
        SESSIONS.c.started_at,
        DEVICES.c.device_type,
        DEVICES.c.capabilities,
        DEVICES.c.confirmed_at,
        is_open_to(SESSIONS.c.id, DEVICES.c.id),
        exists().where(
            SELECTED.c.device_id == DEVICES.c.id,
            SELECTED.c.training_session_id == SESSIONS.c.id,
        ),
    )
    .select_from(SESSIONS)
    .join(DEVICES, true())
    .where(SESSIONS.c.id == bindparam("session"))
)
_OF_ONE: Final = PreparedStatement(_STANDING.where(DEVICES.c.id == bindparam("device")))
_OF_MANY: Final = PreparedStatement(
    _STANDING.add_columns(DEVICES.c.id).where(OneOf(DEVICES.c.id, "ids"))
)


def find_standing(session: Session, training_session_id: str, device_id: str) -> Standing | None:
    """Return the relation of a device to a training session; None if either does not exist."""
    wanted = {"session": training_session_id, "device": device_id}
    rows = _OF_ONE.rows(session, wanted)
    return Standing(*rows[0]) if rows else None


def find_standings(
    session: Session, training_session_id: str, device_ids: Collection[str]
) -> dict[str, Standing]:
    """Return the relations of devices to a training session by device id; unknown devices are left out."""
    wanted = {"session": training_session_id, "ids": list(device_ids)}
    return {row[-1]: Standing(*row[:-1]) for row in _OF_MANY.rows(session, wanted)}
