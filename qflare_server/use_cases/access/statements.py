"""Signed statements of devices: parsed and checked before anything that they name is looked up."""

from functools import lru_cache
from typing import Any, Final, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from qflare.crypto.signing import MAX_MESSAGE_BYTES
from qflare.protocol.constraints import find_violations
from qflare_server.errors import InvalidRequestError

REMEMBERED: Final = 64

Statement = TypeVar("Statement", bound=Message)


def parse_statement(kind: type[Statement], payload: bytes, field: str) -> Statement:
    """Return the statement that an envelope's payload holds. It is shared: read it only.

    A request's constraints do not reach into the payload, which is opaque bytes there; the same constraints are
    checked here.

    Args:
        kind: Type of the statement.
        payload: Payload of the envelope, 1 to `MAX_MESSAGE_BYTES` bytes.
        field: Path of the payload in the request, for errors.

    Raises:
        InvalidRequestError: It is too long, malformed, or breaks a constraint.
    """
    if not 0 < len(payload) <= MAX_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"statement: got {len(payload)} bytes, want 1 to {MAX_MESSAGE_BYTES}", field=field
        )
    named: Any = kind  # to mypy, no type of messages is hashable
    return cast("Statement", _parsed(named, payload, field))


@lru_cache(maxsize=REMEMBERED)  # one call needs its statement for access, and again for its work
def _parsed(kind: type[Message], payload: bytes, field: str) -> Message:
    try:
        statement = kind.FromString(payload)
    except DecodeError as error:
        raise InvalidRequestError(
            f"statement: not one of type {kind.DESCRIPTOR.name}", field=field
        ) from error
    violations = find_violations(statement, f"{field}.")
    if violations:
        InvalidRequestError.raise_for(violations)
    return statement
