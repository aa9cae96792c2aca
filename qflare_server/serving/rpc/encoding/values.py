"""Scalars, times and streams: conversion shared by all messages."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.times import timestamp_of
from qflare.v1 import security_pb2
from qflare_server.serving.rpc.encoding.chunks import writing_chunks

Message = TypeVar("Message")


MAX_SHARED_BYTES: Final = 2 * 2**20
"""Longest first message of a stream that a chunk is added to."""


def timestamp(at: datetime | None) -> Timestamp | None:
    """Encode a time; None for none."""
    return None if at is None else timestamp_of(at)


def moment(message: Any, field: str) -> datetime | None:
    """Return the time in a field; None if it is absent."""
    if not message.HasField(field):
        return None
    found: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return found


def duration(seconds: float | None) -> Duration | None:
    """Encode a duration; None for none."""
    if seconds is None:
        return None
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds(message: Any, field: str) -> float | None:
    """Return the seconds of a duration field; None if it is absent."""
    if not message.HasField(field):
        return None
    return float(getattr(message, field).ToNanoseconds() / 1e9)


def state_name(prefix: str, number: int, names: Any) -> str:
    """Return the stored word of an enum value: `open` for FOO_STATE_OPEN, empty for the unspecified value."""
    word = names.Name(number).removeprefix(prefix).lower()
    return "" if word == "unspecified" else str(word)


def _texts(entries: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in entries.items()
    }


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in entries.items() if isinstance(value, (int, float))}


def envelope(payload: bytes, signature: bytes) -> security_pb2.SignedEnvelope:
    """Decode a stored envelope and its payload."""
    message = security_pb2.SignedEnvelope.FromString(signature)
    message.payload = payload
    return message


def in_messages(
    make: Callable[[], Any], first: Message, chunks: Iterator[tuple[int, bytes]]
) -> Iterator[Any]:
    """Yield a stream's messages: the first chunk travels with the first message, where both fit.

    Later large chunks are yielded as the bytes of their message. Fields are set in place: a chunk message handed to a
    constructor is copied once more.
    """
    message: Any = first
    write = writing_chunks(message.DESCRIPTOR)
    sent = False
    if message.ByteSize() > MAX_SHARED_BYTES:
        yield message
        message, sent = make(), True
    for index, data in chunks:
        written = write(index, data) if sent else None
        if written is None:
            message.chunk.index = index
            message.chunk.data = data
        yield message if written is None else written
        message, sent = make(), True
    if not sent:
        yield message
