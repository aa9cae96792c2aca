"""Updates that travel by way of a gateway or a simulator: signed by one device, sent by another with many others.

It does not keep updates (see `qflare_client.models.outbox`): the holder of a `SignedUpdate` keeps it until it is
settled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import (
    InvalidArgumentError,
    InvalidStatementError,
    QflareClientError,
    TrainingFunctionError,
    error_from_answer,
)
from qflare_client.models.upload import OutgoingPayload, Receipt
from qflare_client.rpc.caller import Calls
from qflare_client.times import delay_s

MAX_PAYLOAD_BYTES: Final = 2**18
"""Largest payload that a coordinator takes in a call of many updates, unless it is configured otherwise."""
MAX_UPDATES: Final = 256
MAX_CALL_BYTES: Final = 3 * 2**20
"""Most bytes of one call: a coordinator takes messages of up to 4 MiB, unless it is configured otherwise."""


@dataclass(frozen=True)
class SignedUpdate:
    """A complete, signed update, to be sent by any enrolled device; it holds the trained values unless it is sealed."""

    _message: messages.SmallUpdate

    @property
    def update_id(self) -> str:
        """Id of the update, a UUID."""
        return self._statement.update_id

    @property
    def device_id(self) -> str:
        """Id of the device that trained it."""
        return self._statement.device_id

    @property
    def _statement(self) -> security_pb2.UpdateStatement:
        return security_pb2.UpdateStatement.FromString(self._message.header.statement.payload)

    def to_bytes(self) -> bytes:
        """Return the update for storage or for the way to the gateway."""
        return self._message.SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SignedUpdate":
        """Return the update that `to_bytes` has written.

        Raises:
            InvalidStatementError: The bytes are no signed update.
        """
        if not isinstance(data, bytes):
            raise InvalidArgumentError(f"data: got {type(data).__name__}, want bytes")
        try:
            message = messages.SmallUpdate.FromString(data)
            security_pb2.UpdateStatement.FromString(message.header.statement.payload)
        except DecodeError as error:
            raise InvalidStatementError("not a signed update") from error
        return cls(message)


def require_small(payload: OutgoingPayload) -> None:
    """Refuse a payload that is too large to travel with others.

    Raises:
        TrainingFunctionError: It is.
    """
    if payload.size_bytes > MAX_PAYLOAD_BYTES:
        raise TrainingFunctionError(
            f"update: got {payload.size_bytes} bytes, want at most {MAX_PAYLOAD_BYTES}: use submit"
        )


def signed_update(envelope: security_pb2.SignedEnvelope, payload: OutgoingPayload) -> SignedUpdate:
    """Return an update with its whole payload."""
    header = messages.UpdateHeader(
        statement=envelope, chunk_digests=payload.chunk_digests, sealed=payload.sealed
    )
    return SignedUpdate(
        messages.SmallUpdate(header=header, payload=b"".join(payload.chunks_from(0)))
    )


def submit_all(
    calls: Calls, updates: Sequence[SignedUpdate], timeout_s: float | None
) -> list[Receipt | QflareClientError]:
    """Send updates, in as few calls as their sizes allow; return the receipt or the refusal of each, in order.

    Raises:
        QflareClientError: A call failed; repeating all of them gives accepted updates the same receipts.
    """
    outcomes: list[Receipt | QflareClientError] = []
    for part in _parts([update._message for update in updates]):  # noqa: SLF001 - of this module
        request = messages.SubmitUpdatesRequest(updates=part)
        answer = calls.unary(calls.transport.stub.SubmitUpdates, request, timeout_s=timeout_s)
        if len(answer.outcomes) != len(part):
            raise InvalidStatementError(f"outcomes: got {len(answer.outcomes)}, want {len(part)}")
        outcomes += map(_outcome, part, answer.outcomes)
    return outcomes


def _parts(updates: Sequence[messages.SmallUpdate]) -> Iterator[list[messages.SmallUpdate]]:
    """Yield the updates of one call after the other."""
    part: list[messages.SmallUpdate] = []
    part_bytes = 0
    for update in updates:
        size = update.ByteSize()
        if part and (len(part) == MAX_UPDATES or part_bytes + size > MAX_CALL_BYTES):
            yield part
            part, part_bytes = [], 0
        part.append(update)
        part_bytes += size
    if part:
        yield part


def _outcome(
    update: messages.SmallUpdate, outcome: messages.UpdateOutcome
) -> Receipt | QflareClientError:
    if outcome.HasField("receipt"):
        return Receipt.from_proto(outcome.receipt, update.header.statement)
    refusal = outcome.refusal
    is_limit = refusal.HasField("retry_delay")
    return error_from_answer(
        code=_code(refusal.code),
        message=refusal.message,
        reason=refusal.reason,
        metadata=dict(refusal.metadata),
        retry_after_s=delay_s(refusal.retry_delay) if is_limit else None,
    )


def _code(number: int) -> str:
    """Return the name of a status code; one that this SDK does not know counts as UNKNOWN."""
    known = dict(code_pb2.Code.items())
    return next((name for name, value in known.items() if value == number), "UNKNOWN")
