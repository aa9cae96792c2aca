"""Commands on versions: upload, download, list, show, rollback, release, evidence."""

import argparse
import itertools
from pathlib import Path
from typing import Any

from qflare.command_line import whole
from qflare.files import private_opener
from qflare.tensors import Manifest
from qflare.tensors.safetensors_files import export_safetensors, with_facts
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.arguments import (
    add_command,
    add_limit,
    add_session,
    add_topic,
    show,
    show_list,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, moment, note, optional, size, span, version_metrics
from qflare_client.admin.sessions import ROUND
from qflare_client.admin.transfers import download_model, upload_model

MODEL: list[Column] = [
    ("version", lambda row: row.version),
    ("base", lambda row: row.base_version if row.base_version >= 0 else None),
    ("round", lambda row: row.round_number or None),
    ("devices", lambda row: row.participant_count),
    ("examples", lambda row: row.example_count),
    ("released", lambda row: row.released),
    ("restores", lambda row: optional(row, "rollback_version")),
    ("metrics", lambda row: version_metrics(row.metrics)),
    ("published", lambda row: moment(row, "create_time")),
    ("digest", lambda row: row.digest[:16]),
]
MODEL_FACTS: list[Column] = [
    *MODEL[:-1],
    ("in-process", lambda row: optional(row, "in_process_count")),
    ("digest", lambda row: row.digest),
    ("payload digest", lambda row: row.payload_digest),
    ("size", lambda row: size(row.size_bytes)),
    ("download", lambda row: size(row.download.size_bytes) if row.HasField("download") else None),
    ("tensors", lambda row: len(row.manifest.tensors) or None),
    ("strategy", lambda row: row.strategy.name),
    ("epsilon", lambda row: optional(row, "epsilon")),
    ("publishing", lambda row: span(row, "publish_duration")),
]


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "model", "versions of global models")
    upload = add_command(
        actions,
        "upload",
        run_upload,
        "upload the initial model from a .safetensors file",
        "model upload digits initial.safetensors",
    )
    add_session(upload)
    upload.add_argument("file", type=Path)
    download = add_command(
        actions,
        "download",
        run_download,
        "download a version to a .safetensors file",
        "model download digits final.safetensors --version 20",
    )
    add_session(download)
    download.add_argument("file", type=Path)
    download.add_argument("--version", type=whole(0), help="default: the latest")
    listing = add_command(actions, "list", run_list, "list versions", "model list digits")
    add_session(listing)
    add_limit(listing)
    shown = add_command(
        actions, "show", run_show, "show a version", "model show digits --version 3"
    )
    add_session(shown)
    shown.add_argument("--version", type=whole(0), help="default: the latest")
    _add_changes(actions)
    _add_evidence(actions)


def _add_evidence(actions: Any) -> None:
    evidence = add_command(
        actions,
        "evidence",
        run_evidence,
        "export a verification bundle of a version",
        "model evidence digits version-3.bundle --version 3",
    )
    add_session(evidence)
    evidence.add_argument("file", type=Path, help="new file")
    evidence.add_argument("--version", type=whole(0), help="default: the latest")


def _add_changes(actions: Any) -> None:
    for name, run, text in (
        ("rollback", run_rollback, "make an older version the base of the next round"),
        ("release", run_release, "release a version, bypassing the release gate"),
    ):
        change = add_command(actions, name, run, text, f"model {name} digits 3 --reason 'drift'")
        add_session(change)
        change.add_argument("version", type=whole(0))
        change.add_argument("--reason", default="", help="for the audit log")


def run_upload(admin: Admin, options: argparse.Namespace) -> None:
    """Upload an initial model."""
    answer = upload_model(admin, options.session, options.file)
    show(options, answer, answer.global_model, MODEL_FACTS)


def run_download(admin: Admin, options: argparse.Namespace) -> None:
    """Download a version and check its bytes against the signed digest."""
    model, checked = download_model(admin, options.session, options.version)
    metadata = with_facts(
        model.architecture,
        training_session_id=model.training_session_id,
        version=model.version,
        digest=model.digest,
        payload_digest=model.payload_digest,
    )
    export_safetensors(options.file, Manifest.from_proto(model.manifest), checked, metadata)
    note(f"wrote version {model.version} to {options.file}")
    if options.json:
        show(options, model, model, MODEL_FACTS)


def run_list(admin: Admin, options: argparse.Namespace) -> None:
    """List versions."""
    request = pb.ListGlobalModelsRequest(training_session_id=options.session)
    answer = admin.collect("ListGlobalModels", request, "global_models", options.limit)
    show_list(options, answer, "global_models", MODEL)


def run_show(admin: Admin, options: argparse.Namespace) -> None:
    """Show a version."""
    request = pb.DescribeGlobalModelRequest(training_session_id=options.session)
    if options.version is not None:
        request.version = options.version
    answer = admin.call("DescribeGlobalModel", request)
    show(options, answer, answer.global_model, MODEL_FACTS)


def run_evidence(admin: Admin, options: argparse.Namespace) -> None:
    """Write a verification bundle: its serialized parts, concatenated."""
    request = pb.ExportVerificationBundleRequest(training_session_id=options.session)
    if options.version is not None:
        request.version = options.version
    parts = admin.receive("ExportVerificationBundle", request)
    first = next(parts)  # a refused call must not leave a file
    with open(options.file, "xb", opener=private_opener) as file:  # Path.open has no opener
        file.writelines(part.bundle.SerializeToString() for part in itertools.chain([first], parts))
    note(f"wrote {options.file}")


def run_rollback(admin: Admin, options: argparse.Namespace) -> None:
    """Make an older version the base of the next round."""
    request = pb.RollbackGlobalModelRequest(
        training_session_id=options.session, version=options.version, reason=options.reason
    )
    answer = admin.call("RollbackGlobalModel", request)
    show(options, answer, answer.global_model, MODEL_FACTS)
    if not options.json and answer.HasField("round"):
        show(options, answer, answer.round, ROUND)


def run_release(admin: Admin, options: argparse.Namespace) -> None:
    """Release a version."""
    request = pb.ReleaseGlobalModelRequest(
        training_session_id=options.session, version=options.version, reason=options.reason
    )
    answer = admin.call("ReleaseGlobalModel", request)
    show(options, answer, answer.global_model, MODEL_FACTS)
