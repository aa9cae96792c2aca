"""Upload of an initial model from a .safetensors file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qflare.tensors import InvalidPayloadError
from qflare.tensors.manifest import InvalidManifestError
from qflare.tensors.safetensors_files import import_safetensors, own_metadata
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.connection import Admin
from qflare_client.errors import InvalidRequestError
from qflare_client.terminal import ProgressBar


def open_model(path: Path) -> Any:
    """Open a .safetensors file.

    Raises:
        InvalidRequestError: It is none, or holds what no model may.
        OSError: It cannot be read.
    """
    try:
        return import_safetensors(path)
    except (InvalidManifestError, InvalidPayloadError) as error:
        raise InvalidRequestError(f"{path}: {error}") from error


def upload_model(admin: Admin, training_session_id: str, path: Path) -> Any:
    """Upload a file as version 0, with a progress bar, and return the answer.

    Raises:
        InvalidRequestError: The file is no model.
        QflareClientError: The coordinator refuses it or cannot be reached.
    """
    opened = open_model(path)
    manifest, bar = opened.manifest, ProgressBar()

    def messages() -> Iterator[pb.UploadInitialModelRequest]:
        header = pb.InitialModelHeader(
            training_session_id=training_session_id,
            manifest=manifest.to_proto(),
            metadata=[
                pb.FileMetadata(name=name, value=value)
                for name, value in own_metadata(opened.metadata).items()
            ],
        )
        yield pb.UploadInitialModelRequest(header=header)
        done = 0
        for index, data in enumerate(opened.chunks()):
            message = pb.UploadInitialModelRequest()
            message.chunk.index, message.chunk.data = index, data
            yield message
            done += len(data)
            bar("upload", done, manifest.size_bytes)

    return admin.send("UploadInitialModel", messages())
