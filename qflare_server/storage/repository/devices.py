"""Statements on devices and their keys."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, bindparam, case, exists, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from qflare_server.errors import ConflictError
from qflare_server.storage import tables
from qflare_server.storage.epochs import bump_rounds, bump_security
from qflare_server.storage.paging import Order, Page, PageRequest, read_page
from qflare_server.storage.prepared import OneOf, PreparedStatement
from qflare_server.storage.records import Device, DeviceKey, Rows
from qflare_server.storage.repository.device_names import free_name, wanted_name
from qflare_server.storage.repository.membership import shares_group
from qflare_server.storage.repository.references import is_meant
from qflare_server.storage.tables import DeviceState

DEVICES = tables.Device.__table__
KEYS = tables.DeviceKey.__table__
DEVICE_GROUPS = tables.DeviceGroup.__table__
_DEVICES = Rows(Device, DEVICES)
_KEYS = Rows(DeviceKey, KEYS)
_DEVICE = _DEVICES.select.where(DEVICES.c.id == bindparam("device"))
_KEY = _KEYS.select.where(KEYS.c.key_id == bindparam("key"))
_INSERT_DEVICE = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(DEVICES)
    .on_conflict_do_nothing(index_elements=["name"])
    .returning(DEVICES.c.id)
    for dialect in (postgresql, sqlite)
}
_NAME_ATTEMPTS: Final = 100
_INSERT_KEY = insert(KEYS)
DECISIVE: Final = ("state", "signature_key_id", "device_type", "capabilities", "confirmed_at")
"""Columns of a device that decide about the authorization of its calls."""
GROUPS_BYTES: Final = 32 * 65
"""Most bytes of a device's groups in a message."""
_COMPARE = {"at_least": operator.ge, "at_most": operator.le, "equal": operator.eq}


@dataclass(frozen=True)
class DeviceFilter:
    """Filter of a list of devices; empty fields do not filter."""

    state: str = ""
    device_type: str = ""
    seen_after: datetime | None = None
    capabilities: tuple[tuple[str, str, float], ...] = ()
    """Name, comparison (at_least, at_most or equal) and value; all must hold."""
    group: str = ""
    reference: str = ""
    """Id, beginning of an id, or name."""


def insert_device(session: Session, values: Mapping[str, Any], *, label: str = "") -> str:
    """Insert a device under a free name and return the name; the caller has checked that the id is free.

    Args:
        session: The transaction.
        values: Columns without the name.
        label: Becomes the name, with a number if another device has it; empty means that the id becomes the name.

    Raises:
        ConflictError: Concurrent calls took every name that was free.
    """
    wanted = wanted_name(label, values["id"])
    statement = _INSERT_DEVICE[session.get_bind().dialect.name]
    for _ in range(_NAME_ATTEMPTS):
        name = free_name(session, wanted)
        if session.connection().execute(statement, {**values, "name": name}).first() is not None:
            return name
    raise ConflictError("every free name of the device was taken at this moment; repeat the call")


def rename_device(session: Session, device_id: str, name: str) -> None:
    """Change the name of a device; the caller has checked that it is free."""
    session.execute(update(DEVICES).where(DEVICES.c.id == device_id).values(name=name))


def get_device(session: Session, device_id: str) -> Device | None:
    """Return a device."""
    return _DEVICES.one(session, _DEVICE, {"device": device_id})


def lock_device(session: Session, device_id: str) -> Device | None:
    """Return a device with its row locked until the transaction ends."""
    return _DEVICES.one(session, _DEVICE.with_for_update(), {"device": device_id})


def update_device(session: Session, device_id: str, values: Mapping[str, Any]) -> None:
    """Update columns of a device; those that decide about its calls take effect on the next call to any coordinator."""
    if not values.keys().isdisjoint(DECISIVE):
        bump_security(session)
        bump_rounds(session)
    session.execute(update(DEVICES).where(DEVICES.c.id == device_id).values(**values))


def insert_key(session: Session, values: Mapping[str, Any]) -> None:
    """Insert a key into a device's history."""
    session.connection().execute(_INSERT_KEY, dict(values))


def get_key(session: Session, key_id: str) -> DeviceKey | None:
    """Return a key of any device, current or retired."""
    return _KEYS.one(session, _KEY, {"key": key_id})


class KnownKey(NamedTuple):
    """A signature key from the history of a device."""

    key_id: str
    device_id: str
    algorithm: int
    public_key: bytes
    retired_at: datetime | None


_KNOWN_KEYS = select(
    KEYS.c.key_id, KEYS.c.device_id, KEYS.c.algorithm, KEYS.c.public_key, KEYS.c.retired_at
).where(KEYS.c.key_id.in_(bindparam("key_ids", expanding=True)))


def get_keys(session: Session, key_ids: Collection[str]) -> dict[str, KnownKey]:
    """Return keys by id, current and retired; unknown ids are left out."""
    if not key_ids:
        return {}
    rows = session.connection().execute(_KNOWN_KEYS, {"key_ids": sorted(key_ids)})
    return {row[0]: KnownKey(*row) for row in rows}


def retire_key(session: Session, key_id: str, reason: str, at: datetime) -> None:
    """Mark a key as no longer current."""
    session.execute(
        update(KEYS).where(KEYS.c.key_id == key_id).values(retired_at=at, retired_reason=reason)
    )


def vouch_for_key(
    session: Session, key_id: str, statement: bytes, *, kem_public_key: bytes | None
) -> None:
    """Store the enrollment receipt of a key, and the KEM key that the receipt names."""
    session.execute(
        update(KEYS)
        .where(KEYS.c.key_id == key_id)
        .values(statement=statement, kem_public_key=kem_public_key)
    )


def keys_without_statement(session: Session) -> Sequence[DeviceKey]:
    """Return the keys without a signed statement, by device and sequence."""
    query = _KEYS.select.where(KEYS.c.statement.is_(None))
    return _KEYS.all(session, query.order_by(KEYS.c.device_id, KEYS.c.sequence))


def last_sequence(session: Session, device_id: str) -> int:
    """Return the sequence number of a device's newest key, 0 if it has none."""
    query = select(func.max(KEYS.c.sequence)).where(KEYS.c.device_id == device_id)
    return session.execute(query).scalar_one() or 0


def record_seen(session: Session, seen: Mapping[str, datetime]) -> None:
    """Write the last-seen times of devices."""
    if seen:
        session.connection().execute(
            update(DEVICES)
            .where(DEVICES.c.id == bindparam("device"))
            .values(last_seen_at=bindparam("at")),
            [{"device": device_id, "at": at} for device_id, at in sorted(seen.items())],
        )


def count_by_state(session: Session) -> dict[str, int]:
    """Return the number of devices in each state."""
    rows = session.execute(select(DEVICES.c.state, func.count()).group_by(DEVICES.c.state))
    return {row[0]: row[1] for row in rows}


def count_by_type(session: Session) -> dict[str, int]:
    """Return the number of devices of each type."""
    rows = session.execute(
        select(DEVICES.c.device_type, func.count()).group_by(DEVICES.c.device_type)
    )
    return {row[0]: row[1] for row in rows}


def list_active(session: Session) -> Sequence[Device]:
    """Return all active devices, by id."""
    query = _DEVICES.select.where(DEVICES.c.state == DeviceState.ACTIVE.value)
    return _DEVICES.all(session, query.order_by(DEVICES.c.id))


def existing_ids(session: Session, device_ids: Sequence[str]) -> set[str]:
    """Return which ids are ids of devices."""
    return set(session.scalars(select(DEVICES.c.id).where(DEVICES.c.id.in_(device_ids))))


def count_active_since(session: Session, since: datetime) -> int:
    """Return the number of active devices seen since a time."""
    query = select(func.count()).where(
        DEVICES.c.state == DeviceState.ACTIVE.value, DEVICES.c.last_seen_at >= since
    )
    return session.execute(query).scalar_one()


class EligibleDevice(NamedTuple):
    """Attributes of a device that selection uses."""

    device_id: str
    device_type: str
    capabilities: dict[str, Any]
    confirmed_at: datetime | None


def eligible_devices(
    session: Session, device_types: Sequence[str], training_session_id: str | None = None
) -> Sequence[EligibleDevice]:
    """Return active devices by id.

    Args:
        session: Where to read.
        device_types: Kinds of devices; empty means any.
        training_session_id: Only those in a group that this training session is open to; None means any.
    """
    query = select(
        DEVICES.c.id, DEVICES.c.device_type, DEVICES.c.capabilities, DEVICES.c.confirmed_at
    ).where(DEVICES.c.state == DeviceState.ACTIVE.value)
    if device_types:
        query = query.where(DEVICES.c.device_type.in_(device_types))
    if training_session_id is not None:
        query = query.where(shares_group(training_session_id, DEVICES.c.id))
    return [EligibleDevice(*row) for row in session.execute(query.order_by(DEVICES.c.id))]


def mark_inactive(session: Session, before: datetime) -> int:
    """Mark active devices not seen since a time as inactive; return their number."""
    result = session.execute(
        update(DEVICES)
        .where(
            DEVICES.c.state == DeviceState.ACTIVE.value,
            func.coalesce(DEVICES.c.last_seen_at, DEVICES.c.registered_at) < before,
        )
        .values(state=DeviceState.INACTIVE.value, state_reason="not seen")
    )
    count = int(result.rowcount)  # type: ignore[attr-defined]  # a CursorResult has it
    if count:
        bump_security(session)
    return count


def list_devices(session: Session, request: PageRequest, wanted: DeviceFilter) -> Page[Device]:
    """Return devices, by id, as rows with the columns of a device."""
    query = _DEVICES.select.order_by(DEVICES.c.id)
    if wanted.state:
        query = query.where(DEVICES.c.state == wanted.state)
    if wanted.device_type:
        query = query.where(DEVICES.c.device_type == wanted.device_type)
    if wanted.seen_after is not None:
        query = query.where(DEVICES.c.last_seen_at > wanted.seen_after)
    if wanted.group:
        query = query.where(
            exists().where(
                DEVICE_GROUPS.c.device_id == DEVICES.c.id,
                DEVICE_GROUPS.c.group_name == wanted.group,
            )
        )
    if wanted.reference:
        query = query.where(is_meant(session, DEVICES, wanted.reference))
    for name, comparison, value in wanted.capabilities:
        query = query.where(_COMPARE[comparison](_capability(session, name), value))
    order = Order[Device](
        (str,), lambda row: [row.id], lambda key: DEVICES.c.id > key[0], extra_bytes=GROUPS_BYTES
    )
    return read_page(partial(_DEVICES.all, session), query, request, order, "devices", wanted)


def _capability(session: Session, name: str) -> ColumnElement[float]:
    """Return a capability as a number, null if it is not a number: casting text would fail the whole query."""
    value = DEVICES.c.capabilities[name]
    if session.get_bind().dialect.name == "postgresql":
        is_number = func.json_typeof(value) == "number"
    else:
        is_number = func.json_type(value).in_(["integer", "real"])
    return case((is_number, value.as_float()))


def reactivate(session: Session, device_id: str) -> None:
    """Make an inactive device active; does nothing in any other state."""
    bump_security(session)
    session.execute(
        update(DEVICES)
        .where(DEVICES.c.id == device_id, DEVICES.c.state == DeviceState.INACTIVE.value)
        .values(state=DeviceState.ACTIVE.value, state_reason="")
    )


@dataclass(frozen=True)
class LoginKey:
    """State and signature key of a device, as a login needs them."""

    device_id: str
    state: str
    algorithm: int | None
    public_key: bytes | None
    key_id: str | None


_LOGIN_KEY = select(
    DEVICES.c.id,
    DEVICES.c.state,
    DEVICES.c.signature_algorithm,
    DEVICES.c.signature_public_key,
    DEVICES.c.signature_key_id,
).where(DEVICES.c.id == bindparam("device_id"))


def find_login_key(session: Session, device_id: str) -> LoginKey | None:
    """Return state and signature key of a device."""
    row = session.connection().execute(_LOGIN_KEY, {"device_id": device_id}).one_or_none()
    return None if row is None else LoginKey(*row)


def states_of(session: Session, device_ids: Iterable[str]) -> dict[str, str]:
    """Return the states of devices by id; unknown ids are left out."""
    return dict(_STATES.rows(session, {"ids": list(device_ids)}))


_STATES = PreparedStatement(select(DEVICES.c.id, DEVICES.c.state).where(OneOf(DEVICES.c.id, "ids")))


class Signer(NamedTuple):
    """The current signature key of a device, and its state."""

    device_id: str
    state: str
    key_id: str | None
    key_algorithm: int | None
    public_key: bytes | None


def signers_of(session: Session, device_ids: Iterable[str]) -> dict[str, Signer]:
    """Return the current keys of devices by device id; unknown ids are left out."""
    rows = _SIGNERS.rows(session, {"ids": list(device_ids)})
    return {row[0]: Signer(*row) for row in rows}


_SIGNERS = PreparedStatement(
    select(
        DEVICES.c.id,
        DEVICES.c.state,
        DEVICES.c.signature_key_id,
        DEVICES.c.signature_algorithm,
        DEVICES.c.signature_public_key,
    ).where(OneOf(DEVICES.c.id, "ids"))
)
