"""Model downloads: verified chunk by chunk, resumable.

Invariants: nothing is returned unless the statement is signed by a model key of the keyset, the version follows the
last accepted one (`qflare_client.trust.keyset`), and every chunk matches its digest under the statement's Merkle root:
that of the payload, or that of the requested download encoding. Chunks are checked in order. A sealed version is
decrypted segment by segment, after each segment has been checked (`qflare_client.models.sealed_model`), and the
plaintext has to match the signed digest as well.

It does not store downloaded versions.
"""

import hmac
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import sealed_size_bytes
from qflare.crypto.sealing import KemKey
from qflare.evidence.lineage import ModelVersion
from qflare.tensors import CHUNK_BYTES, Array, InvalidManifestError, Manifest, assemble, chunks
from qflare.tensors.download_encodings import widened
from qflare.tensors.encodings import Encoding
from qflare.tensors.safetensors_files import export_safetensors, with_facts
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client import arguments
from qflare_client.errors import CorruptModelError
from qflare_client.models.sealed_model import ModelOpener
from qflare_client.rpc.caller import Calls

ProgressHook: TypeAlias = Callable[[str, int, int], None]
"""``hook(what, done_bytes, total_bytes)``, where `what` is "download" or "upload"."""


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """No-op `ProgressHook`."""
    del what, done_bytes, total_bytes


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """One verified version of the global model."""

    training_session_id: str
    """Training session, a UUID."""

    version: int
    """Version; 0 is the initial model."""

    digest: str
    """Digest of its signed statement, 64 hex digits; identifies the version."""

    arrays: dict[str, Array]
    """The tensors by name, in manifest order, writable, native-endian."""

    manifest: Manifest
    """Layout of the payload."""

    metrics: Mapping[str, float]
    """Metrics of its statement, by name."""

    model_type: str
    """Kind of model, free text."""

    architecture: Mapping[str, str]
    """Description of the architecture, free text."""

    released: bool
    """Whether the coordinator states that it is released."""

    statement: security_pb2.ModelStatement
    """The signed statement."""

    envelope: security_pb2.SignedEnvelope
    """The statement as received, with its signatures, as evidence."""

    encoding: Encoding = Encoding.FULL_PRECISION
    """Download encoding; except for FULL_PRECISION, the arrays are the version rounded to this encoding."""

    def save(self, path: Path) -> None:
        """Write the tensors to a ``.safetensors`` file, durably and atomically.

        Raises:
            InvalidArgumentError: It is no path.
            OSError: It cannot be written.
        """
        path = arguments.path("path", path)
        facts = with_facts(
            self.architecture,
            training_session_id=self.training_session_id,
            version=self.version,
            digest=self.digest,
            encoding=self.encoding.name.lower(),
        )
        export_safetensors(path, self.manifest, chunks(self.arrays, self.manifest), facts)


HeaderCheck: TypeAlias = Callable[[messages.GlobalModelHeader], ModelVersion]
"""Verifies the statement and its links; raises `VerificationError`."""


class Download:
    """One download, across any number of attempts.

    Args:
        calls: Authenticated calls.
        request: The request, with `first_chunk` 0.
        check_header: Verifies the statement in the header.
        progress: Called with the number of received bytes.
        kem_key: Returns the device's KEM key, for sealed versions; None if sealed versions are not supported.
    """

    def __init__(
        self,
        calls: Calls,
        request: messages.GetGlobalModelRequest,
        check_header: HeaderCheck,
        progress: ProgressHook,
        kem_key: Callable[[], KemKey] | None = None,
    ) -> None:
        self._kem_key = kem_key
        self._opener: ModelOpener | None = None
        self._calls = calls
        self._request = request
        self._check_header = check_header
        self._encoding = Encoding.from_number(request.encoding)
        self._progress = progress
        self._header: messages.GlobalModelHeader | None = None
        self._verified: ModelVersion | None = None
        self._leaf_hashes: list[bytes] = []
        self._next_chunk = 0

    def run(self, timeout_s: float | None = None) -> GlobalModel:
        """Download and verify.

        Raises:
            VerificationError: Statement, links or bytes do not verify.
            QflareClientError: The error of the last attempt.
        """
        responses = self._calls.receive(
            self._calls.transport.stub.GetGlobalModel,
            self._next_request,
            is_progress=lambda response: response.HasField("chunk"),
            timeout_s=timeout_s,
        )
        first = next(responses, None)
        if first is None or not first.HasField("header"):
            raise CorruptModelError("the download begins without a header")
        verified = self._take_header(first.header)
        manifest = _manifest(first.header, verified.statement)
        chunks = self._chunks(first, responses, _form(verified.statement, self._encoding)[0])
        arrays = _assemble(manifest, self._encoding, chunks)
        return self._global_model(first.header, verified, manifest, arrays)

    def _next_request(self) -> messages.GetGlobalModelRequest:
        request = messages.GetGlobalModelRequest()
        request.CopyFrom(self._request)
        request.first_chunk = self._next_chunk
        if self._verified is not None:
            # "The latest" may be another version than at the first attempt.
            request.version = self._verified.statement.version
            request.released = False
        return request

    def _take_header(self, header: messages.GlobalModelHeader) -> ModelVersion:
        if self._header is None or self._verified is None:
            verified = self._check_header(header)
            if (header.encoding or Encoding.FULL_PRECISION) != self._encoding:
                raise CorruptModelError(
                    f"encoding: got number {header.encoding}, want {self._encoding.name}"
                    "; if a later release made it, upgrade qflare"
                )
            self._leaf_hashes = _leaf_hashes(
                header, *_wire_form(verified.statement, self._encoding)
            )
            self._opener = self._opener_of(header, verified.statement)
            self._verified = verified
            self._header = header
        elif header.statement.payload != self._header.statement.payload:
            raise CorruptModelError("another version was sent when the download was resumed")
        return self._verified

    def _opener_of(
        self, header: messages.GlobalModelHeader, statement: security_pb2.ModelStatement
    ) -> ModelOpener | None:
        if not statement.sealed:
            return None
        if self._kem_key is None:
            raise CorruptModelError("the version is sealed, and there is no key to open it")
        return ModelOpener(header.sealed, statement, self._kem_key())

    def _chunks(
        self,
        first: messages.GetGlobalModelResponse,
        rest: Iterator[messages.GetGlobalModelResponse],
        total_bytes: int,
    ) -> Iterator[bytes]:
        """Yield the verified chunks of the payload in order."""
        if first.HasField("chunk"):
            yield self._take_chunk(first.chunk, total_bytes)
        # Reads the expected number of chunks and does not wait for the end of the stream.
        while self._next_chunk < len(self._leaf_hashes):
            response = next(rest, None)
            if response is None:
                raise CorruptModelError(
                    f"got {self._next_chunk} chunks, want {len(self._leaf_hashes)}"
                )
            if response.HasField("header"):
                self._take_header(response.header)
            if response.HasField("chunk"):
                yield self._take_chunk(response.chunk, total_bytes)
        if self._opener is not None:
            self._opener.finish()

    def _take_chunk(self, chunk: messages.Chunk, total_bytes: int) -> bytes:
        if chunk.index != self._next_chunk or chunk.index >= len(self._leaf_hashes):
            raise CorruptModelError(f"chunk: got {chunk.index}, want {self._next_chunk}")
        data = chunk.data
        if not hmac.compare_digest(merkle.leaf_hash(data), self._leaf_hashes[chunk.index]):
            raise CorruptModelError(f"chunk {chunk.index} is not the one that was signed")
        self._next_chunk += 1
        done_bytes = min(self._next_chunk * CHUNK_BYTES, total_bytes)
        self._progress("download", done_bytes, total_bytes)
        return data if self._opener is None else self._opener.open(chunk.index, data)

    def _global_model(
        self,
        header: messages.GlobalModelHeader,
        verified: ModelVersion,
        manifest: Manifest,
        arrays: dict[str, Array],
    ) -> GlobalModel:
        statement = verified.statement
        return GlobalModel(
            training_session_id=statement.training_session_id,
            version=statement.version,
            digest=verified.digest,
            arrays=arrays,
            manifest=manifest,
            metrics=dict(statement.metrics),
            model_type=header.global_model.model_type,
            architecture=dict(header.global_model.architecture),
            released=header.global_model.released,
            statement=statement,
            envelope=header.statement,
            encoding=self._encoding,
        )


def _manifest(
    header: messages.GlobalModelHeader, statement: security_pb2.ModelStatement
) -> Manifest:
    """Return the layout after checking it against the statement."""
    try:
        manifest = Manifest.from_proto(header.global_model.manifest)
    except InvalidManifestError as error:
        raise CorruptModelError(f"manifest: {error}") from error
    got = (manifest.layout_digest, manifest.size_bytes)
    if got != (statement.layout_digest, statement.size_bytes):
        raise CorruptModelError("the manifest is not the one that was signed")
    return manifest


def _form(statement: security_pb2.ModelStatement, encoding: Encoding) -> tuple[int, str]:
    """Return the size and digest of a version in an encoding, from its statement."""
    if encoding is Encoding.FULL_PRECISION:
        return statement.size_bytes, statement.payload_digest
    if statement.download.encoding != int(encoding):
        raise CorruptModelError(f"the statement names no payload in {encoding.name}")
    return statement.download.size_bytes, statement.download.payload_digest


def _wire_form(statement: security_pb2.ModelStatement, encoding: Encoding) -> tuple[int, str]:
    """Return the size and digest of a version as transmitted in an encoding: of the segments if it is sealed."""
    if not statement.sealed:
        return _form(statement, encoding)
    if encoding is not Encoding.FULL_PRECISION:
        raise CorruptModelError(f"a sealed version has no payload in {encoding.name}")
    return sealed_size_bytes(statement.size_bytes), statement.wire_digest


def _leaf_hashes(
    header: messages.GlobalModelHeader, size_bytes: int, payload_digest: str
) -> list[bytes]:
    """Return the digest of each chunk after checking them against the signed Merkle root."""
    data = header.chunk_digests
    size = merkle.HASH_BYTES
    if len(data) != size * -(-size_bytes // CHUNK_BYTES):
        raise CorruptModelError(f"chunk digests: got {len(data)} bytes for the payload's size")
    leaf_hashes = [data[start : start + size] for start in range(0, len(data), size)]
    if merkle.root(leaf_hashes).hex() != payload_digest:
        raise CorruptModelError("the chunk digests are not under the signed root")
    return leaf_hashes


def _assemble(manifest: Manifest, encoding: Encoding, chunks: Iterator[bytes]) -> dict[str, Array]:
    """Return the tensors; a smaller encoding is widened piece by piece, so that memory holds one copy."""
    try:
        if encoding is Encoding.FULL_PRECISION:
            return assemble(manifest, chunks)
        return assemble(manifest, widened(manifest, encoding, chunks))
    except ValueError as error:
        raise CorruptModelError(str(error)) from error
