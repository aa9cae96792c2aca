"""Messages that hold one large chunk and nothing else, read and written with fewer copies than protobuf makes.

On the wire such a message is a few bytes before the chunk's own. protobuf copies the chunk twice to read it and three
times to write it. Messages in any other form, which means the same to protobuf, take protobuf's way.

Source: protobuf documentation, Encoding; field numbers are those of `protos/qflare/v1/coordinator_service.proto`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import Descriptor

from qflare.tensors import CHUNK_BYTES
from qflare.v1.coordinator_service_pb2 import Chunk

LEAST_BYTES: Final = 65_536
"""Smaller chunks are not worth it."""
_LENGTH_DELIMITED: Final = 2
_MORE: Final = 0x80  # added to each digit of a number but the last
_MOST_DIGITS: Final = 5  # of a number of up to 35 bits, 7 in a byte


def _tag(descriptor: Descriptor, name: str) -> int:
    """Return the first byte of a field: its number and the type of what follows."""
    field = descriptor.fields_by_name[name]
    return field.number << 3 | (_LENGTH_DELIMITED if field.type != field.TYPE_INT64 else 0)


_INDEX: Final = _tag(Chunk.DESCRIPTOR, "index")
_DATA: Final = _tag(Chunk.DESCRIPTOR, "data")


@dataclass(frozen=True, slots=True)
class ReceivedChunk:
    """A chunk that is still part of the message in which it came; `data` keeps that message in memory."""

    index: int
    data: memoryview


class ChunkMessage:
    """A message with a chunk and no other field, in place of protobuf's; has what the readers of a stream use.

    Args:
        chunk: Its chunk.
        empty: A protobuf message of its type without any field.
    """

    __slots__ = ("_empty", "chunk")

    def __init__(self, chunk: ReceivedChunk, empty: Any) -> None:
        self.chunk = chunk
        self._empty = empty

    def HasField(self, name: str) -> bool:  # noqa: N802  # the name that protobuf gives it
        """Return whether a field is set, as protobuf messages do."""
        return name == "chunk"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._empty, name)


def reading_chunks(parse: Callable[[bytes], Any], empty: Any) -> Callable[[bytes], Any]:
    """Return a deserializer that reads large chunks itself and leaves all other messages to `parse`.

    Args:
        parse: Deserializer of a message type with a field `chunk`.
        empty: A message of this type without any field.
    """
    tag = _tag(empty.DESCRIPTOR, "chunk")

    def read(data: bytes) -> Any:
        chunk = _read_chunk(data, tag)
        return parse(data) if chunk is None else ChunkMessage(chunk, empty)

    return read


def _read_chunk(data: bytes, tag: int) -> ReceivedChunk | None:
    """Return the chunk of a message that is written as protobuf libraries write it; None of any other."""
    if len(data) < LEAST_BYTES or data[0] != tag:
        return None
    size, position = _read_number(data, 1)
    if size != len(data) - position:
        return None
    index = 0
    if data[position] == _INDEX:
        index, position = _read_number(data, position + 1)
    if data[position] != _DATA:
        return None
    size, position = _read_number(data, position + 1)
    if size != len(data) - position or size > CHUNK_BYTES:
        return None
    return ReceivedChunk(index, memoryview(data)[position:])


def _read_number(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of up to 35 bits and where it ends; -1 if it has more."""
    number = 0
    for place in range(_MOST_DIGITS):
        digit = data[position + place]
        number |= (digit & ~_MORE) << (7 * place)
        if digit < _MORE:
            return number, position + place + 1
    return -1, position


def writing_chunks(descriptor: Descriptor) -> Callable[[int, bytes], bytes | None]:
    """Return a function that writes a message with a large chunk and no other field; None for a small chunk.

    Args:
        descriptor: Of a message type with a field `chunk`.
    """
    tag = _tag(descriptor, "chunk")

    def write(index: int, data: bytes) -> bytes | None:
        if len(data) < LEAST_BYTES:
            return None
        inner = bytes((_INDEX,)) + _number(index) if index else b""
        inner += bytes((_DATA,)) + _number(len(data))
        return b"".join((bytes((tag,)), _number(len(inner) + len(data)), inner, data))

    return write


def _number(number: int) -> bytes:
    """Write a number, 0 or above, seven bits in a byte, the least significant first."""
    digits = bytearray()
    while number >= _MORE:
        digits.append(number % _MORE | _MORE)
        number >>= 7
    digits.append(number)
    return bytes(digits)
