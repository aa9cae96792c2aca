"""Upload of initial models and download of versions, chunk by chunk."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflare.crypto import merkle
from qflare.tensors import Array, InvalidPayloadError, Manifest, check_arrays, chunks
from qflare.tensors.manifest import InvalidManifestError
from qflare.tensors.safetensors_files import import_safetensors, own_metadata
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client.admin.connection import Admin
from qflare_client.errors import CorruptModelError, InvalidRequestError
from qflare_client.terminal import ProgressBar


@dataclass(frozen=True)
class InitialModel:
    """A model to upload.

    Attributes:
        manifest: Its layout.
        chunks: Its payload in chunks of 1 MiB; iterated once.
        metadata: Free text of the file that it is from.
    """

    manifest: Manifest
    chunks: Iterable[bytes]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_model(source: Path | Mapping[str, Array]) -> InitialModel:
    """Open a .safetensors file, or arrays by name.

    Raises:
        InvalidRequestError: It is no model, or holds what no model may.
        OSError: The file cannot be read.
    """
    try:
        if isinstance(source, Path):
            opened = import_safetensors(source)
            return InitialModel(opened.manifest, opened.chunks(), own_metadata(opened.metadata))
        manifest = Manifest.from_arrays(source)
        check_arrays(source, manifest)
        return InitialModel(manifest, chunks(source, manifest))
    except (InvalidManifestError, InvalidPayloadError) as error:
        name = source if isinstance(source, Path) else "model"
        raise InvalidRequestError(f"{name}: {error}", metadata={"field": "model"}) from error


def upload_model(
    admin: Admin, training_session_id: str, source: Path | Mapping[str, Array]
) -> pb.UploadInitialModelResponse:
    """Upload a model as version 0, with a progress bar, and return the answer.

    Raises:
        InvalidRequestError: The source is no model.
        QflareClientError: The coordinator refuses it or cannot be reached.
    """
    opened = open_model(source)
    bar = ProgressBar()

    def messages() -> Iterator[pb.UploadInitialModelRequest]:
        header = pb.InitialModelHeader(
            training_session_id=training_session_id,
            manifest=opened.manifest.to_proto(),
            metadata=[
                pb.FileMetadata(name=name, value=value) for name, value in opened.metadata.items()
            ],
        )
        yield pb.UploadInitialModelRequest(header=header)
        done = 0
        for index, data in enumerate(opened.chunks):
            message = pb.UploadInitialModelRequest()
            message.chunk.index, message.chunk.data = index, data
            yield message
            done += len(data)
            bar("upload", done, opened.manifest.size_bytes)

    answer: pb.UploadInitialModelResponse = admin.send("UploadInitialModel", messages())
    return answer


def download_model(
    admin: Admin, training_session_id: str, version: int | None
) -> tuple[training_pb2.GlobalModel, Iterator[bytes]]:
    """Return a version and its chunks, checked against the signed digest as they arrive.

    Args:
        admin: The connection.
        training_session_id: Training session.
        version: None means the latest.

    Raises:
        CorruptModelError: The statement or, after the last chunk, the bytes do not match the version's digest.
        QflareClientError: The call failed.
    """
    request = pb.DownloadGlobalModelRequest(training_session_id=training_session_id)
    if version is not None:
        request.version = version
    messages = admin.receive("DownloadGlobalModel", request)
    first = next(messages)
    model, statement = first.header.global_model, first.header.statement.payload
    if hashlib.sha256(statement).hexdigest() != model.digest:
        raise CorruptModelError("the statement does not match the version's digest")
    return model, _checked(first, messages)


def _checked(first: Any, messages: Iterator[Any]) -> Iterator[bytes]:
    model, bar = first.header.global_model, ProgressBar()
    leaves, done = [], 0
    for message in itertools.chain([first], messages):
        if message.HasField("chunk"):
            leaves.append(merkle.leaf_hash(message.chunk.data))
            done += len(message.chunk.data)
            bar("download", done, model.size_bytes)
            yield message.chunk.data
    if merkle.root(leaves).hex() != model.payload_digest:
        raise CorruptModelError("the bytes are not those of the version")
