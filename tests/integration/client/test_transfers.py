"""Uploads and downloads over connections that break."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto import merkle
from qflare.evidence.lineage import ModelVersion
from qflare.tensors import CHUNK_BYTES, Array, Manifest, chunks, payload_digest
from qflare.tensors.download_encodings import narrowed
from qflare.tensors.encodings import Encoding, decode, encode
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import CorruptModelError, QflareClientError, RoundNotOpenError
from qflare_client.models.download import Download, GlobalModel
from qflare_client.models.upload import Payload, Receipt, Upload
from qflare_client.rpc.caller import Calls
from tests.integration.client.conftest import Scripted, fail

MakeCalls = Callable[..., Calls]
UPDATE_ID = "00000000-0000-4000-8000-000000000001"
STATEMENT = security_pb2.SignedEnvelope(payload=b"statement")


def arrays_of(chunk_count: int) -> dict[str, Array]:
    """Arrays whose payload has some chunks, the last one short."""
    size_bytes = (chunk_count - 1) * CHUNK_BYTES + 400
    generator = np.random.default_rng(7)
    return {
        "a": generator.normal(size=10).astype(np.float32),
        "b": generator.normal(size=size_bytes // 4 - 10).astype(np.float32),
    }


def receipt() -> messages.SubmitUpdateResponse:
    return messages.SubmitUpdateResponse(
        update_id=UPDATE_ID, acceptance_sequence=3, accept_time=Timestamp(seconds=5)
    )


class Uploads:
    """Takes an upload; breaks the attempts that it is told to, after some chunks.

    Args:
        breaks: Chunks after which each attempt breaks; further attempts succeed.
        loses_receipts: Attempts break after the last chunk has been taken.
    """

    def __init__(self, *breaks: int, loses_receipts: bool = False) -> None:
        self.breaks = list(breaks)
        self.loses_receipts = loses_receipts
        self.headers: list[messages.UpdateHeader] = []
        self.stored: list[bytes] = []
        self.first_indices: list[int] = []
        self.message_count = 0
        self.accepted = False

    def submit(
        self, requests: Iterator[messages.SubmitUpdateRequest], context: grpc.ServicerContext
    ) -> messages.SubmitUpdateResponse:
        limit, chunk_count = self.breaks.pop(0) if self.breaks else None, 0
        for request in requests:
            self.message_count += 1
            if request.HasField("header"):
                self.headers.append(request.header)
            if not request.HasField("chunk"):
                continue
            if not chunk_count:
                self.first_indices.append(request.chunk.index)
            if limit is not None and chunk_count >= limit:
                fail(context, grpc.StatusCode.UNAVAILABLE)
            assert request.chunk.index == len(self.stored)
            self.stored.append(request.chunk.data)
            chunk_count += 1
        self.accepted = True
        if self.loses_receipts:
            fail(context, grpc.StatusCode.UNAVAILABLE)
        return receipt()

    def state(
        self, request: messages.GetUploadRequest, _: grpc.ServicerContext
    ) -> messages.GetUploadResponse:
        assert request.update_id == UPDATE_ID
        if self.accepted:
            return messages.GetUploadResponse(receipt=receipt())
        return messages.GetUploadResponse(next_chunk=len(self.stored))


def upload(
    scripted: Scripted, calls: Calls, uploads: Uploads, arrays: dict[str, Array], **options: Any
) -> Receipt:
    scripted.answers = {"SubmitUpdate": uploads.submit, "GetUpload": uploads.state}
    payload = Payload(Manifest.from_arrays(arrays), arrays)
    options = {"progress": lambda *_: None, **options}
    return Upload(calls, UPDATE_ID, STATEMENT, payload, **options).run()


def payload_of(arrays: dict[str, Array]) -> bytes:
    return b"".join(chunks(arrays, Manifest.from_arrays(arrays)))


def test_a_small_update_is_one_message(scripted: Scripted, make_calls: MakeCalls) -> None:
    uploads = Uploads()

    got = upload(scripted, make_calls(), uploads, arrays_of(1))

    assert uploads.message_count == 1
    assert (got.update_id, got.acceptance_sequence) == (UPDATE_ID, 3)


def test_the_header_goes_before_the_chunks(scripted: Scripted, make_calls: MakeCalls) -> None:
    """A coordinator waits for a call's first message some seconds only, which a chunk may take longer than."""
    uploads = Uploads()
    arrays = arrays_of(4)

    upload(scripted, make_calls(), uploads, arrays)

    assert b"".join(uploads.stored) == payload_of(arrays)
    assert uploads.message_count == 5


def test_an_update_without_bytes_is_a_header(scripted: Scripted, make_calls: MakeCalls) -> None:
    headers = []

    def submit(requests: Any, _: object) -> messages.SubmitUpdateResponse:
        headers.extend(list(requests))
        return receipt()

    scripted.answers["SubmitUpdate"] = submit
    payload = Payload(Manifest(()), {})
    Upload(make_calls(), UPDATE_ID, STATEMENT, payload, progress=lambda *_: None).run()

    assert [message.HasField("chunk") for message in headers] == [False]


@pytest.mark.parametrize("breaks", [(0,), (1,), (3,), (2, 0, 1)])
def test_a_broken_upload_goes_on_where_it_was(
    scripted: Scripted, make_calls: MakeCalls, breaks: tuple[int, ...]
) -> None:
    uploads = Uploads(*breaks)
    arrays = arrays_of(4)

    upload(scripted, make_calls(), uploads, arrays)

    assert b"".join(uploads.stored) == payload_of(arrays)
    assert uploads.first_indices[1] == breaks[0]


def test_every_attempt_carries_the_same_statement(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    uploads = Uploads(1, 1)

    upload(scripted, make_calls(), uploads, arrays_of(4))

    assert len(uploads.headers) == 3
    assert all(header == uploads.headers[0] for header in uploads.headers)


def test_a_lost_receipt_is_asked_for(scripted: Scripted, make_calls: MakeCalls) -> None:
    uploads = Uploads(loses_receipts=True)

    got = upload(scripted, make_calls(), uploads, arrays_of(2))

    assert got.acceptance_sequence == 3
    assert len(uploads.headers) == 1


def test_a_refusal_in_the_middle_is_raised(scripted: Scripted, make_calls: MakeCalls) -> None:
    def refuse(requests: Any, context: grpc.ServicerContext) -> None:
        next(requests)
        from google.rpc.error_details_pb2 import ErrorInfo  # noqa: PLC0415

        fail(context, grpc.StatusCode.FAILED_PRECONDITION, ErrorInfo(reason="ROUND_NOT_OPEN"))

    scripted.answers["SubmitUpdate"] = refuse
    arrays = arrays_of(40)
    payload = Payload(Manifest.from_arrays(arrays), arrays)

    with pytest.raises(RoundNotOpenError):
        Upload(make_calls(), UPDATE_ID, STATEMENT, payload, progress=lambda *_: None).run()


def test_upload_progress_is_told(scripted: Scripted, make_calls: MakeCalls) -> None:
    arrays = arrays_of(3)
    told: list[tuple[str, int, int]] = []

    upload(scripted, make_calls(), Uploads(), arrays, progress=lambda *step: told.append(step))

    total = len(payload_of(arrays))
    assert told == [
        ("upload", CHUNK_BYTES, total),
        ("upload", 2 * CHUNK_BYTES, total),
        ("upload", total, total),
    ]


class Downloads:
    """Serves a version, in an encoding; breaks the attempts that it is told to, after some chunks."""

    def __init__(
        self,
        arrays: dict[str, Array],
        *breaks: int,
        encoding: Encoding = Encoding.FULL_PRECISION,
    ) -> None:
        self.manifest = Manifest.from_arrays(arrays)
        whole = list(chunks(arrays, self.manifest))
        self.chunks = list(narrowed(self.manifest, encoding, whole))
        number = training_pb2.Encoding.ValueType(encoding)
        self.breaks = list(breaks)
        self.requests: list[messages.GetGlobalModelRequest] = []
        self.statement = security_pb2.ModelStatement(
            training_session_id="s",
            version=4,
            layout_digest=self.manifest.layout_digest,
            size_bytes=self.manifest.size_bytes,
            payload_digest=payload_digest(whole),
        )
        if encoding is not Encoding.FULL_PRECISION:
            self.statement.download.encoding = number
            self.statement.download.size_bytes = sum(map(len, self.chunks))
            self.statement.download.payload_digest = payload_digest(self.chunks)
        self.header = messages.GlobalModelHeader(
            global_model=training_pb2.GlobalModel(manifest=self.manifest.to_proto()),
            statement=security_pb2.SignedEnvelope(payload=self.statement.SerializeToString()),
            chunk_digests=b"".join(merkle.leaf_hash(chunk) for chunk in self.chunks),
            encoding=number,
        )

    def serve(
        self, request: messages.GetGlobalModelRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.GetGlobalModelResponse]:
        self.requests.append(request)
        limit = self.breaks.pop(0) if self.breaks else None
        header: messages.GlobalModelHeader | None = self.header
        for number, index in enumerate(range(request.first_chunk, len(self.chunks))):
            if number == limit:
                fail(context, grpc.StatusCode.UNAVAILABLE)
            chunk = messages.Chunk(index=index, data=self.chunks[index])
            yield messages.GetGlobalModelResponse(header=header, chunk=chunk)
            header = None
        if header is not None:
            yield messages.GetGlobalModelResponse(header=header)


def read_statement(header: messages.GlobalModelHeader) -> ModelVersion:
    """Stands for the verification of the signature, which has tests of its own."""
    statement = security_pb2.ModelStatement.FromString(header.statement.payload)
    return ModelVersion(statement, "digest")


def download(
    scripted: Scripted,
    calls: Calls,
    downloads: Downloads,
    progress: Callable[..., None] = lambda *_: None,
    encoding: Encoding = Encoding.FULL_PRECISION,
) -> GlobalModel:
    scripted.answers = {"GetGlobalModel": downloads.serve}
    number = training_pb2.Encoding.ValueType(encoding)
    request = messages.GetGlobalModelRequest(training_session_id="s", encoding=number)
    return Download(calls, request, read_statement, progress).run()


def assert_same(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("chunk_count", [1, 2, 5])
def test_a_version_arrives(scripted: Scripted, make_calls: MakeCalls, chunk_count: int) -> None:
    arrays = arrays_of(chunk_count)

    model = download(scripted, make_calls(), Downloads(arrays))

    assert_same(model.arrays, arrays)
    assert (model.version, model.digest) == (4, "digest")


def test_download_progress_is_told(scripted: Scripted, make_calls: MakeCalls) -> None:
    told: list[tuple[str, int, int]] = []
    downloads = Downloads(arrays_of(2))

    download(scripted, make_calls(), downloads, lambda *step: told.append(step))

    total = downloads.manifest.size_bytes
    assert told == [("download", CHUNK_BYTES, total), ("download", total, total)]


def test_a_version_without_bytes_arrives(scripted: Scripted, make_calls: MakeCalls) -> None:
    assert download(scripted, make_calls(), Downloads({})).arrays == {}


def test_a_broken_download_goes_on_where_it_was(scripted: Scripted, make_calls: MakeCalls) -> None:
    arrays = arrays_of(6)
    downloads = Downloads(arrays, 2, 0, 3)

    model = download(scripted, make_calls(), downloads)

    assert_same(model.arrays, arrays)
    assert [request.first_chunk for request in downloads.requests] == [0, 2, 2, 5]


def test_a_resumed_download_stays_with_its_version(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    downloads = Downloads(arrays_of(3), 1)

    download(scripted, make_calls(), downloads)

    assert [request.HasField("version") for request in downloads.requests] == [False, True]
    assert downloads.requests[1].version == 4


def refuse_download(scripted: Scripted, calls: Calls, downloads: Downloads) -> None:
    with pytest.raises(CorruptModelError):
        download(scripted, calls, downloads)


def test_another_version_after_a_break_is_refused(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    downloads = Downloads(arrays_of(3), 1)
    serve = downloads.serve

    def swap(request: Any, context: Any) -> Iterator[messages.GetGlobalModelResponse]:
        if downloads.requests:
            downloads.statement.version = 5
            downloads.header.statement.payload = downloads.statement.SerializeToString()
        yield from serve(request, context)

    downloads.serve = swap  # type: ignore[method-assign]

    refuse_download(scripted, make_calls(), downloads)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_bit_is_found(scripted: Scripted, make_calls: MakeCalls, index: int) -> None:
    downloads = Downloads(arrays_of(3))
    chunk = bytearray(downloads.chunks[index])
    chunk[len(chunk) // 2] ^= 1
    downloads.chunks[index] = bytes(chunk)

    refuse_download(scripted, make_calls(), downloads)


def test_swapped_chunks_are_found(scripted: Scripted, make_calls: MakeCalls) -> None:
    downloads = Downloads(arrays_of(4))
    downloads.chunks[1:3] = downloads.chunks[2:0:-1]

    refuse_download(scripted, make_calls(), downloads)


def test_a_missing_chunk_is_found(scripted: Scripted, make_calls: MakeCalls) -> None:
    downloads = Downloads(arrays_of(3))
    downloads.chunks.pop()

    refuse_download(scripted, make_calls(), downloads)


def test_other_chunk_digests_are_found(scripted: Scripted, make_calls: MakeCalls) -> None:
    downloads = Downloads(arrays_of(3))
    downloads.header.chunk_digests = downloads.header.chunk_digests[:-1] + b"?"

    refuse_download(scripted, make_calls(), downloads)


def test_another_layout_is_found(scripted: Scripted, make_calls: MakeCalls) -> None:
    downloads = Downloads(arrays_of(2))
    other = Manifest.from_arrays({"c": np.zeros(downloads.manifest.size_bytes // 4, np.float32)})
    downloads.header.global_model.manifest.CopyFrom(other.to_proto())

    refuse_download(scripted, make_calls(), downloads)


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.BFLOAT16])
def test_a_smaller_version_goes_on_where_it_broke_and_is_widened(
    scripted: Scripted, make_calls: MakeCalls, encoding: Encoding
) -> None:
    arrays = arrays_of(6)
    downloads = Downloads(arrays, 1, 0, encoding=encoding)

    model = download(scripted, make_calls(), downloads, encoding=encoding)

    wire = encode(arrays, downloads.manifest, encoding)
    assert_same(model.arrays, decode(wire, downloads.manifest, encoding))
    assert {array.dtype for array in model.arrays.values()} == {np.dtype(np.float32)}
    assert (model.encoding, model.manifest) == (encoding, downloads.manifest)
    assert [request.first_chunk for request in downloads.requests] == [0, 1, 1]
    assert {request.encoding for request in downloads.requests} == {int(encoding)}


def test_progress_is_told_in_bytes_that_travel(scripted: Scripted, make_calls: MakeCalls) -> None:
    told: list[tuple[str, int, int]] = []
    downloads = Downloads(arrays_of(3), encoding=Encoding.FLOAT16)

    download(scripted, make_calls(), downloads, lambda *step: told.append(step), Encoding.FLOAT16)

    assert told[-1] == ("download", downloads.manifest.size_bytes // 2, told[-1][2])
    assert told[-1][2] == downloads.manifest.size_bytes // 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_flipped_bit_of_a_smaller_version_is_found(
    scripted: Scripted, make_calls: MakeCalls, index: int
) -> None:
    downloads = Downloads(arrays_of(4), encoding=Encoding.FLOAT16)
    chunk = downloads.chunks[index]
    downloads.chunks[index] = bytes([chunk[0] ^ 1]) + chunk[1:]

    with pytest.raises(CorruptModelError, match=f"chunk {index} is not the one that was signed"):
        download(scripted, make_calls(), downloads, encoding=Encoding.FLOAT16)


def test_another_encoding_than_was_asked_for_is_refused(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    with pytest.raises(CorruptModelError, match="encoding: got number 1, want FLOAT16"):
        download(scripted, make_calls(), Downloads(arrays_of(1)), encoding=Encoding.FLOAT16)


def test_a_smaller_version_that_nobody_signed_is_refused(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    downloads = Downloads(arrays_of(1), encoding=Encoding.FLOAT16)
    downloads.statement.ClearField("download")
    downloads.header.statement.payload = downloads.statement.SerializeToString()

    with pytest.raises(CorruptModelError, match="names no payload in FLOAT16"):
        download(scripted, make_calls(), downloads, encoding=Encoding.FLOAT16)


def test_a_download_begins_with_a_header(scripted: Scripted, make_calls: MakeCalls) -> None:
    def serve(_: object, __: object) -> Iterator[messages.GetGlobalModelResponse]:
        yield messages.GetGlobalModelResponse(chunk=messages.Chunk(index=0, data=b"x"))

    scripted.answers["GetGlobalModel"] = serve
    request = messages.GetGlobalModelRequest(training_session_id="s")

    with pytest.raises(QflareClientError):
        Download(make_calls(), request, read_statement, lambda *_: None).run()
