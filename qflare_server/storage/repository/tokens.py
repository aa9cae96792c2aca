"""Statements on tokens and nonces. Token secrets are not stored; rows are found by the SHA-256 of the secret."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import and_, bindparam, delete, exists, insert, or_, select, text, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.epochs import bump_security
from qflare_server.storage.paging import Order, Page, PageRequest, earlier, read_page
from qflare_server.storage.prepared import PreparedStatement
from qflare_server.storage.records import Rows, UserToken
from qflare_server.storage.repository.device_names import NAME_BYTES
from qflare_server.storage.tables import TokenKind

TOKENS = tables.UserToken.__table__
_ROWS = Rows(UserToken, TOKENS)
_BY_ID = _ROWS.select.where(TOKENS.c.id == bindparam("token_id"))
_BY_HASH = _ROWS.select.where(TOKENS.c.token_hash == bindparam("hash"))
NONCES = tables.UsedNonce.__table__
DEVICES = tables.Device.__table__


@dataclass(frozen=True)
class Credential:
    """A token with the state and key of its device, read for each call; device fields are None for administrators."""

    token_id: str
    kind: str
    subject: str
    roles: Sequence[str]
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None
    binding_key: bytes | None
    device_id: str | None
    device_state: str | None
    key_id: str | None
    key_algorithm: int | None
    public_key: bytes | None


_CREDENTIAL = PreparedStatement(
    select(
        TOKENS.c.id,
        TOKENS.c.kind,
        TOKENS.c.subject,
        TOKENS.c.roles,
        TOKENS.c.expires_at,
        TOKENS.c.revoked_at,
        TOKENS.c.used_at,
        TOKENS.c.binding_key,
        DEVICES.c.id,
        DEVICES.c.state,
        DEVICES.c.signature_key_id,
        DEVICES.c.signature_algorithm,
        DEVICES.c.signature_public_key,
    )
    .select_from(TOKENS.outerjoin(DEVICES, TOKENS.c.device_id == DEVICES.c.id))
    .where(TOKENS.c.token_hash == bindparam("hash"))
)


def find_credential(session: Session, token_hash: str) -> Credential | None:
    """Return the token with this hash and the state of its device; one statement."""
    rows = _CREDENTIAL.rows(session, {"hash": token_hash})
    return Credential(*rows[0]) if rows else None


def insert_token(
    session: Session,
    *,
    token_id: str,
    token_hash: str,
    kind: TokenKind,
    subject: str,
    at: datetime,
    expires_at: datetime | None,
    device_id: str | None = None,
    roles: Sequence[str] = (),
    family_id: str | None = None,
    binding_key: bytes | None = None,
    device_groups: Sequence[str] = (),
) -> None:
    """Insert a token."""
    session.execute(
        insert(TOKENS).values(
            id=token_id,
            token_hash=token_hash,
            kind=kind.value,
            subject=subject,
            device_id=device_id,
            roles=list(roles),
            family_id=family_id,
            binding_key=binding_key,
            device_groups=list(device_groups) or None,
            created_at=at,
            expires_at=expires_at,
        )
    )


def get_token(session: Session, token_id: str) -> UserToken | None:
    """Return a token by its id."""
    return _ROWS.one(session, _BY_ID, {"token_id": token_id})


def has_kind(session: Session, kind: str) -> bool:
    """Return whether the database has a token of a kind, in any state."""
    return session.execute(select(exists().where(TOKENS.c.kind == kind))).scalar_one()


def find_by_hash(session: Session, token_hash: str) -> UserToken | None:
    """Return a token by the hash of its secret."""
    return _ROWS.one(session, _BY_HASH, {"hash": token_hash})


_CONSUME = (
    update(TOKENS)
    .where(
        TOKENS.c.id == bindparam("token_id"),
        TOKENS.c.used_at.is_(None),
        TOKENS.c.revoked_at.is_(None),
        or_(TOKENS.c.expires_at.is_(None), TOKENS.c.expires_at > bindparam("at")),
    )
    .values(used_at=bindparam("at"), last_used_at=bindparam("at"))
)


def consume(session: Session, token_id: str, at: datetime) -> bool:
    """Mark a one-time token as used; False if it was used or revoked before, or has expired.

    The condition is part of the UPDATE: of two concurrent calls, one gets True.
    """
    values = {"token_id": token_id, "at": at}
    return _rowcount(session.connection().execute(_CONSUME, values)) == 1


def revoke(session: Session, token_id: str, reason: str, at: datetime) -> bool:
    """Revoke a token; False if it was revoked before."""
    return _revoke(session, TOKENS.c.id == token_id, reason, at) == 1


def revoke_family(session: Session, family_id: str, reason: str, at: datetime) -> int:
    """Revoke all tokens of a login, because a refresh token was used twice."""
    return _revoke(session, TOKENS.c.family_id == family_id, reason, at)


def revoke_device_tokens(session: Session, device_id: str, reason: str, at: datetime) -> int:
    """Revoke all tokens of a device."""
    return _revoke(session, TOKENS.c.device_id == device_id, reason, at)


def _revoke(session: Session, condition: Any, reason: str, at: datetime) -> int:
    bump_security(session)
    result = session.execute(
        update(TOKENS)
        .where(condition, TOKENS.c.revoked_at.is_(None))
        .values(revoked_at=at, revoked_reason=reason)
    )
    return _rowcount(result)


def delete_expired(session: Session, before: datetime, limit: int) -> int:
    """Delete access and refresh tokens that expired before a time; enrollment and admin tokens are kept as a record."""
    ids = session.scalars(
        select(TOKENS.c.id)
        .where(
            TOKENS.c.expires_at < before,
            TOKENS.c.kind.in_([TokenKind.ACCESS.value, TokenKind.REFRESH.value]),
        )
        .limit(limit)
    ).all()
    if ids:
        session.execute(delete(TOKENS).where(TOKENS.c.id.in_(ids)))
    return len(ids)


def list_tokens(session: Session, request: PageRequest, kind: str) -> Page[UserToken]:
    """Return tokens of one kind, or of all kinds if `kind` is empty; newest first."""
    query = _ROWS.select.order_by(TOKENS.c.created_at.desc(), TOKENS.c.id.desc())
    if kind:
        query = query.where(TOKENS.c.kind == kind)
    order = Order[UserToken](
        (datetime, str),
        lambda row: (row.created_at.isoformat(), row.id),
        lambda key: earlier(TOKENS.c.created_at, TOKENS.c.id, key),
        extra_bytes=NAME_BYTES,
    )
    return read_page(partial(_ROWS.all, session), query, request, order, "tokens", kind)


def delete_expired_nonces(session: Session, before: datetime, limit: int) -> int:
    """Delete nonces that expired before a time, at most so many; return how many."""
    expired = select(NONCES.c.nonce).where(NONCES.c.expires_at < before).limit(limit)
    found = session.scalars(expired).all()
    if found:
        session.execute(delete(NONCES).where(NONCES.c.nonce.in_(found)))
    return len(found)


def delete_oldest_of_device(session: Session, device_id: str, kept: int) -> None:
    """Delete the access and refresh tokens of a device but the newest ones."""
    kinds = [TokenKind.ACCESS.value, TokenKind.REFRESH.value]
    surplus = (
        select(TOKENS.c.id)
        .where(TOKENS.c.device_id == device_id, TOKENS.c.kind.in_(kinds))
        .order_by(TOKENS.c.created_at.desc(), TOKENS.c.id)
        .offset(kept)
    )
    found = session.scalars(surplus).all()
    if found:
        session.execute(delete(TOKENS).where(TOKENS.c.id.in_(found)))


def _rowcount(result: Any) -> int:
    return int(result.rowcount)


def revoke_sessions(
    session: Session, device_id: str, reason: str, at: datetime, *, except_family: str | None = None
) -> int:
    """Revoke the access and refresh tokens of a device, except those of one login."""
    kinds = [TokenKind.ACCESS.value, TokenKind.REFRESH.value]
    condition = and_(TOKENS.c.device_id == device_id, TOKENS.c.kind.in_(kinds))
    if except_family is not None:
        condition = and_(condition, TOKENS.c.family_id != except_family)
    return _revoke(session, condition, reason, at)


_BIND = (
    update(TOKENS)
    .where(TOKENS.c.id == bindparam("token_id"))
    .values(device_id=bindparam("bound_to"))
)


def bind_to_device(session: Session, token_id: str, device_id: str) -> None:
    """Record which device was enrolled with an enrollment token."""
    session.connection().execute(_BIND, {"token_id": token_id, "bound_to": device_id})


_INSERT_TOKEN = insert(TOKENS)
_USE_NONCE = text(
    "INSERT INTO used_nonces (nonce, expires_at) VALUES (:nonce, :expires_at) ON CONFLICT DO NOTHING"
).bindparams(bindparam("expires_at", type_=NONCES.c.expires_at.type))


def insert_session(
    session: Session,
    issued: Sequence[tuple[TokenKind, str, str, datetime]],
    *,
    device_id: str,
    family_id: str,
    binding_key: bytes,
    at: datetime,
) -> None:
    """Insert the tokens of a login in one statement.

    Args:
        session: Open transaction.
        issued: Kind, id, hash and expiry of each token.
        device_id: Device of the tokens.
        family_id: Login of the tokens.
        binding_key: Binding key of the login, sealed.
        at: Time of issue.
    """
    rows: list[dict[str, Any]] = [
        {
            "id": token_id,
            "token_hash": token_hash,
            "kind": kind.value,
            "subject": device_id,
            "device_id": device_id,
            "family_id": family_id,
            "roles": [],
            "binding_key": binding_key,
            "created_at": at,
            "expires_at": expires_at,
            "revoked_reason": "",
        }
        for kind, token_id, token_hash, expires_at in issued
    ]
    session.connection().execute(_INSERT_TOKEN, rows)


def use_nonce(session: Session, nonce: str, expires_at: datetime) -> bool:
    """Record the use of a nonce; False if it was used before, also by a concurrent call."""
    values = {"nonce": nonce, "expires_at": expires_at}
    return _rowcount(session.connection().execute(_USE_NONCE, values)) == 1
