"""Messages of one large chunk: what is read and written past protobuf is what protobuf reads and writes."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from qflare.protocol.constraints import find_violations
from qflare.tensors import CHUNK_BYTES
from qflare.v1 import admin_service_pb2, coordinator_service_pb2
from qflare.v1.coordinator_service_pb2 import Chunk, SubmitUpdateRequest
from qflare_server.serving.rpc.encoding.chunks import (
    LEAST_BYTES,
    ChunkMessage,
    reading_chunks,
    writing_chunks,
)

RESPONSES = (
    coordinator_service_pb2.GetGlobalModelResponse,
    admin_service_pb2.DownloadGlobalModelResponse,
)
INDICES = st.one_of(st.integers(0, 300), st.integers(0, 2**35 - 1))
SIZES = st.one_of(st.integers(LEAST_BYTES, LEAST_BYTES + 300), st.just(CHUNK_BYTES))

read = reading_chunks(SubmitUpdateRequest.FromString, SubmitUpdateRequest())


def message(index: int, size_bytes: int) -> bytes:
    """Return the message of a chunk as protobuf writes it."""
    data = bytes([index % 251]) * size_bytes
    return SubmitUpdateRequest(chunk=Chunk(index=index, data=data)).SerializeToString()


@given(INDICES, SIZES)
def test_a_large_chunk_is_read_in_place(index: int, size_bytes: int) -> None:
    data = message(index, size_bytes)

    found, wanted = read(data), SubmitUpdateRequest.FromString(data)

    assert isinstance(found, ChunkMessage)
    assert found.chunk.data.obj is data
    assert (found.chunk.index, bytes(found.chunk.data)) == (wanted.chunk.index, wanted.chunk.data)
    assert (found.HasField("chunk"), found.HasField("header")) == (True, False)
    assert found.header == wanted.header
    assert (
        find_violations(wanted) == []
    )  # which are not looked for in a chunk that is read in place


def outcome(parse: Any, data: bytes) -> Any:
    """Return what a deserializer makes of a message: header and chunk, or that it is none."""
    try:
        found = parse(data)
    except DecodeError:
        return DecodeError
    chunk = (found.chunk.index, bytes(found.chunk.data)) if found.HasField("chunk") else None
    return found.HasField("header"), found.header, chunk


@given(
    INDICES,
    st.integers(0, 24),
    st.binary(max_size=6),
    st.integers(0, 6),
    st.sampled_from([0, 1, -1, -40_000]),
)
def test_whatever_comes_is_read_as_protobuf_reads_it(
    index: int, position: int, inserted: bytes, removed: int, cut: int
) -> None:
    data = message(index, 2 * LEAST_BYTES)
    altered = data[:position] + inserted + data[position + removed :]
    altered = altered + b"\0" * cut if cut > 0 else altered[: len(altered) + cut]

    assert outcome(read, altered) == outcome(SubmitUpdateRequest.FromString, altered)


@pytest.mark.parametrize("first", ["header", "chunk"])
def test_a_message_with_more_than_a_chunk_is_left_to_protobuf(first: str) -> None:
    request = SubmitUpdateRequest(chunk=Chunk(index=1, data=bytes(CHUNK_BYTES)))
    request.header.statement.payload = b"statement"
    parts = {
        "header": SubmitUpdateRequest(header=request.header).SerializeToString(),
        "chunk": SubmitUpdateRequest(chunk=request.chunk).SerializeToString(),
    }
    data = parts.pop(first) + b"".join(parts.values())

    assert read(data) == request


def test_a_chunk_that_is_too_long_or_short_is_left_to_protobuf() -> None:
    for size_bytes in (0, 1, LEAST_BYTES - 20, CHUNK_BYTES + 1):
        assert isinstance(read(message(7, size_bytes)), SubmitUpdateRequest)


@given(INDICES, SIZES, st.sampled_from(RESPONSES))
def test_a_large_chunk_is_written_as_protobuf_writes_it(
    index: int, size_bytes: int, response: Any
) -> None:
    data = bytes([index % 251]) * size_bytes

    written = writing_chunks(response.DESCRIPTOR)(index, data)

    assert written == response(chunk=Chunk(index=index, data=data)).SerializeToString()


def test_a_small_chunk_is_left_to_protobuf() -> None:
    assert writing_chunks(RESPONSES[0].DESCRIPTOR)(0, bytes(LEAST_BYTES - 1)) is None
