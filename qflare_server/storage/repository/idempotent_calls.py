"""Idempotency of calls with a request id: repeated calls take effect once.

A call's claim on its request id is a row, inserted in the transaction of the change. Of two concurrent equal calls, one
inserts the primary key; the other waits for its commit and finds its response.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

from sqlalchemy import bindparam, delete, select, text, update
from sqlalchemy.orm import Session

from qflare_server.errors import AlreadyExistsError, RequestIdReusedError
from qflare_server.storage import tables
from qflare_server.storage.repository.audit import Caller, Claim

CALLS = tables.IdempotentCall.__table__
T = TypeVar("T")
MAX_KEPT: Final = 10_000
"""Most calls that are kept; the oldest are deleted first."""


class RepeatedCallError(Exception):
    """The call was made before.

    Attributes:
        response: The original response, serialized.
    """

    def __init__(self, response: bytes) -> None:
        super().__init__("the call was made before")
        self.response = response


def run_once(session: Session, caller: Caller, at: datetime, work: Callable[[], T]) -> T:
    """Make a change, unless the same call has made it before.

    Args:
        session: Open transaction; the claim commits with the change.
        caller: With a claim where the call has a request id.
        at: Time of the call.
        work: Makes the change.

    Raises:
        RepeatedCallError: The call was made before; has its response.
        RequestIdReusedError: A call with another body had the request id.
        AlreadyExistsError: The call was made before and issued secrets, which are not kept.
    """
    claim = caller.claim
    if claim is None:
        return work()
    if not _insert(session, caller.name, claim, at):
        raise_if_repeated(session, caller)
    result = work()
    if claim.encode is not None:
        session.execute(
            update(CALLS).where(*_is_call(caller.name, claim)).values(response=claim.encode(result))
        )
    return result


def raise_if_repeated(session: Session, caller: Caller) -> None:
    """Do nothing for a call that was not made before.

    Raises:
        RepeatedCallError: The call was made before; has its response.
        RequestIdReusedError: A call with another body had the request id.
        AlreadyExistsError: The call was made before and issued secrets, which are not kept.
    """
    claim = caller.claim
    if claim is None:
        return
    query = select(CALLS.c.request_digest, CALLS.c.response).where(*_is_call(caller.name, claim))
    known = session.execute(query).one_or_none()
    if known is None:
        return
    metadata = {"field": "request_id"}
    if known[0] != claim.digest:
        raise RequestIdReusedError("request_id: another request had it", metadata)
    if known[1] is None:
        raise AlreadyExistsError(
            "request_id: this call has issued tokens, whose secrets are not kept", metadata
        )
    raise RepeatedCallError(known[1])


_INSERT = text(
    "INSERT INTO idempotent_calls (actor, method, request_id, request_digest, created_at)"
    " VALUES (:actor, :method, :request_id, :digest, :at) ON CONFLICT DO NOTHING"
).bindparams(bindparam("at", type_=CALLS.c.created_at.type))


def _insert(session: Session, actor: str, claim: Claim, at: datetime) -> bool:
    """Insert the claim of a call; False if it exists. Waits for a concurrent call with the same claim."""
    values = {
        "actor": actor,
        "method": claim.method,
        "request_id": claim.request_id,
        "digest": claim.digest,
        "at": at,
    }
    result: Any = session.connection().execute(_INSERT, values)
    return int(result.rowcount) == 1


def _is_call(actor: str, claim: Claim) -> tuple[Any, ...]:
    return (
        CALLS.c.actor == actor,
        CALLS.c.method == claim.method,
        CALLS.c.request_id == claim.request_id,
    )


def delete_old(session: Session, before: datetime) -> None:
    """Delete the calls made before a time, and the oldest beyond `MAX_KEPT`."""
    oldest_kept = (
        select(CALLS.c.created_at).order_by(CALLS.c.created_at.desc()).offset(MAX_KEPT - 1).limit(1)
    )
    bound = session.execute(oldest_kept).scalar_one_or_none()
    session.execute(
        delete(CALLS).where(CALLS.c.created_at < (before if bound is None else max(before, bound)))
    )
