"""`model`: import and export models."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qflare.command_line import whole
from qflare.tensors import InvalidPayloadError
from qflare.tensors.manifest import InvalidManifestError
from qflare.tensors.safetensors_files import (
    SafetensorsFile,
    export_safetensors,
    import_safetensors,
    own_metadata,
    with_facts,
)
from qflare.terminal import say
from qflare.v1 import admin_service_pb2
from qflare_server.cli import verify
from qflare_server.cli.terminal import REFERENCE, caller, progress
from qflare_server.config import ServerConfig
from qflare_server.errors import InvalidRequestError
from qflare_server.serving.application import open_application
from qflare_server.training.versions import manifest_of


def add(commands: Any) -> None:
    """Add this module's parsers."""
    model = commands.add_parser("model", help="import and export models")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    verify.add_model_verify(actions)
    importing = actions.add_parser(
        "import",
        help="make a .safetensors file the initial model of a training session",
        epilog="example: qflare-server model import SESSION initial.safetensors",
    )
    importing.add_argument("session", help=REFERENCE)
    importing.add_argument("file", type=Path)
    importing.set_defaults(run=run_import)
    exporting = actions.add_parser(
        "export",
        help="write a version to a .safetensors file",
        epilog="example: qflare-server model export SESSION final.safetensors --version 20",
    )
    exporting.add_argument("session", help=REFERENCE)
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--version", type=whole(0), help="default: the latest")
    exporting.set_defaults(run=run_export)


def run_import(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Import an initial model."""
    with open_application(config) as parts:
        session_id = parts.use_cases.training.find_id(arguments.session)
        digest = upload_initial_model(parts.use_cases.initial_models, session_id, arguments.file)
    say(f"version 0 {digest}")
    return 0


def open_model(path: Path) -> SafetensorsFile:
    """Open a .safetensors file.

    Raises:
        InvalidRequestError: It is no model, or holds what no model may.
        OSError: It cannot be read.
    """
    try:
        return import_safetensors(path)
    except (InvalidManifestError, InvalidPayloadError) as error:
        raise InvalidRequestError(f"{path}: {error}", field="model") from error


def upload_initial_model(initial_models: Any, training_session_id: str, path: Path) -> str:
    """Upload a .safetensors file as version 0 and return its digest."""
    opened_file = open_model(path)
    manifest = opened_file.manifest
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=training_session_id,
        manifest=manifest.to_proto(),
        metadata=[
            admin_service_pb2.FileMetadata(name=name, value=value)
            for name, value in own_metadata(opened_file.metadata).items()
        ],
    )
    numbered = enumerate(progress(opened_file.chunks(), manifest.chunk_count, "importing"))
    return str(initial_models.upload(caller(), header, numbered).digest)


def run_export(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Export a version."""
    with open_application(config) as parts:
        deliveries = parts.use_cases.deliveries
        session_id = parts.use_cases.training.find_id(arguments.session)
        delivery = deliveries.find(session_id, arguments.version)
        model = delivery.model
        opened_chunks = deliveries.opened(caller(), delivery, 0)
        chunks: Iterator[bytes] = (data for _, data in opened_chunks)
        metadata = with_facts(
            model.architecture,
            training_session_id=model.training_session_id,
            version=model.version,
            digest=model.digest,
            payload_digest=model.payload_digest,
        )
        shown = progress(chunks, delivery.payload.chunk_count, "exporting")
        export_safetensors(arguments.file, manifest_of(model), shown, metadata)
    say(f"wrote version {model.version} to {arguments.file}")
    return 0
