"""Commands that work on the database itself, also while a coordinator serves on it."""

import argparse
import getpass
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from qflare.safetensors_files import export_safetensors, import_safetensors
from qflare.v1 import admin_service_pb2, training_pb2
from qflare_server.commands import verify
from qflare_server.config import ServerConfig
from qflare_server.keys.setup import bootstrap_bundle, write_bootstrap
from qflare_server.parts import Parts, opened
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import Caller
from qflare_server.terminal import progress, table
from qflare_server.training.versions import manifest_of
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.access.tokens import Issued


def caller() -> Caller:
    """Return who runs the command, for the audit log."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return Caller(f"admin:{name}@local", "", "operating-system")


def add(commands: Any) -> None:
    """Add the parsers of this topic."""
    _add_tokens(commands)
    _add_sessions(commands)
    _add_models(commands)
    status = commands.add_parser(
        "status", help="show training sessions and devices", epilog="example: qflare-server status"
    )
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=run_status)


def _add_tokens(commands: Any) -> None:
    token = commands.add_parser("token", help="issue enrollment and admin tokens")
    actions = token.add_subparsers(required=True, metavar="ACTION")
    issue = actions.add_parser(
        "issue",
        help="issue enrollment tokens",
        epilog="example: qflare-server token issue --count 10 --label ward-3 --output tokens.txt",
    )
    issue.add_argument("--count", type=int, default=1, help="how many (1 to 1000)")
    issue.add_argument("--label", default="", help="what they are for")
    issue.add_argument("--lifetime-s", type=float, help="seconds that they live")
    issue.add_argument("--device", default="", help="device that lost its keys")
    issue.add_argument(
        "--bundles", type=Path, help="write a bootstrap bundle for each into this folder"
    )
    issue.add_argument("--address", help="where devices reach the coordinator, with --bundles")
    issue.add_argument("--ca", type=Path, help="PEM file of the TLS certificate authority")
    issue.add_argument(
        "--output", type=Path, help="write to this new 0600 file instead of printing"
    )
    issue.set_defaults(run=run_issue)
    admin = actions.add_parser(
        "issue-admin",
        help="issue an admin token",
        epilog="example: qflare-server token issue-admin --name alice --role operator --output a.token",
    )
    admin.add_argument("--name", required=True, help="who it is for")
    roles = sorted({Role.VIEWER, Role.OPERATOR, Role.ADMIN, Role.AUDITOR})
    admin.add_argument("--role", action="append", choices=roles, required=True, help="repeatable")
    admin.add_argument("--lifetime-s", type=float, help="seconds that it lives")
    admin.add_argument(
        "--output", type=Path, help="write to this new 0600 file instead of printing"
    )
    admin.set_defaults(run=run_issue_admin)


def _add_sessions(commands: Any) -> None:
    session = commands.add_parser("session", help="create and start training sessions")
    actions = session.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="create a training session, with --model also start it",
        epilog="example: qflare-server session create --name digits --rounds 20 --quorum 10"
        " --model initial.safetensors --start",
    )
    create.add_argument("--name", required=True)
    create.add_argument("--model-type", default="")
    create.add_argument("--rounds", type=int, default=0, help="rounds to run")
    create.add_argument("--quorum", type=int, default=0, help="updates that make a version")
    create.add_argument("--deadline-s", type=float, help="seconds that a round is open at most")
    create.add_argument("--strategy", default="", help="fedavg unless said otherwise")
    create.add_argument(
        "--sealed", action="store_true", help="seal updates and models end to end and at rest"
    )
    create.add_argument("--config", type=Path, help="TrainingConfig as JSON; flags override")
    create.add_argument("--model", type=Path, help="initial model, .safetensors")
    create.add_argument("--start", action="store_true", help="start the first round")
    create.set_defaults(run=run_create)
    for word in ("start", "pause", "resume", "cancel"):
        action = actions.add_parser(word, help=f"{word} a training session")
        action.add_argument("session", help="id")
        action.set_defaults(run=run_transition, transition=word)


def _add_models(commands: Any) -> None:
    model = commands.add_parser("model", help="import and export models")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    verify.add_model_verify(actions)
    importing = actions.add_parser(
        "import",
        help="make a .safetensors file the initial model of a training session",
        epilog="example: qflare-server model import SESSION initial.safetensors",
    )
    importing.add_argument("session", help="id")
    importing.add_argument("file", type=Path)
    importing.set_defaults(run=run_import)
    exporting = actions.add_parser(
        "export",
        help="write a version to a .safetensors file",
        epilog="example: qflare-server model export SESSION final.safetensors --version 20",
    )
    exporting.add_argument("session", help="id")
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--version", type=int, help="default: the latest")
    exporting.set_defaults(run=run_export)


def run_issue(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Issue enrollment tokens."""
    with opened(config) as parts:
        issued = parts.use_cases.tokens.issue_enrollment(
            caller(),
            count=arguments.count,
            label=arguments.label,
            lifetime_s=arguments.lifetime_s,
            device_id=arguments.device,
        )
        if arguments.bundles is not None:
            _write_bundles(parts, issued, arguments)
            return 0
    _hand_out([item.secret for item in issued], arguments.output)
    return 0


def _write_bundles(parts: Parts, issued: Sequence[Issued], arguments: argparse.Namespace) -> None:
    """Write what each device needs, its token included, to a 0600 file of its own."""
    certificates = arguments.ca.read_text() if arguments.ca else ""
    address = arguments.address or parts.config.listen
    arguments.bundles.mkdir(mode=0o700, parents=True, exist_ok=True)
    for item in issued:
        bundle = bootstrap_bundle(
            parts.keys.trust,
            address,
            enrollment_token=item.secret,
            certificate_authorities=certificates,
        )
        write_bootstrap(arguments.bundles / f"{item.token.id}.json", bundle)
    print(f"wrote {len(issued)} bundles to {arguments.bundles}")


def run_issue_admin(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Issue an admin token."""
    with opened(config) as parts:
        roles = [Role(role) for role in arguments.role]
        issued = parts.use_cases.tokens.issue_admin(
            caller(), arguments.name, roles, arguments.lifetime_s
        )
    _hand_out([issued.secret], arguments.output)
    return 0


def _hand_out(secrets: list[str], output: Path | None) -> None:
    """Print secrets, or write them to a new file that only its owner can read."""
    if output is None:
        print("\n".join(secrets))
        return
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(secrets) + "\n")
    print(f"wrote {len(secrets)} tokens to {output}")


def run_create(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Create a training session."""
    wanted = _training_config(arguments)
    with opened(config) as parts:
        training = parts.use_cases.training
        created = training.create(
            caller(),
            name=arguments.name,
            model_type=arguments.model_type,
            architecture={},
            config=wanted,
        )
        if arguments.model is not None:
            _upload(parts.use_cases.initial_models, created.id, arguments.model)
        if arguments.start:
            training.start(caller(), created.id)
    print(created.id)
    return 0


def _training_config(arguments: argparse.Namespace) -> training_pb2.TrainingConfig:
    wanted = training_pb2.TrainingConfig()
    if arguments.config is not None:
        json_format.Parse(arguments.config.read_text(), wanted)
    wanted.total_rounds = arguments.rounds or wanted.total_rounds
    wanted.rounds.quorum = arguments.quorum or wanted.rounds.quorum
    wanted.strategy.name = arguments.strategy or wanted.strategy.name
    wanted.transfer.sealed = arguments.sealed or wanted.transfer.sealed
    if arguments.deadline_s is not None:
        deadline = Duration()
        deadline.FromNanoseconds(int(arguments.deadline_s * 1e9))
        wanted.rounds.deadline.CopyFrom(deadline)
    return wanted


def run_transition(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Start, pause, resume or cancel a training session."""
    with opened(config) as parts:
        training = parts.use_cases.training
        if arguments.transition == "cancel":
            row = training.cancel(caller(), arguments.session, "cancelled by command")
        else:
            row = getattr(training, arguments.transition)(caller(), arguments.session)
    print(f"{row.id} {row.state}")
    return 0


def run_import(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Import an initial model."""
    with opened(config) as parts:
        digest = _upload(parts.use_cases.initial_models, arguments.session, arguments.file)
    print(f"version 0 {digest}")
    return 0


def _upload(initial_models: Any, training_session_id: str, path: Path) -> str:
    opened_file = import_safetensors(path)
    manifest = opened_file.manifest
    header = admin_service_pb2.InitialModelHeader(
        training_session_id=training_session_id, manifest=manifest.to_proto()
    )
    numbered = enumerate(progress(opened_file.chunks(), manifest.chunk_count, "importing"))
    return str(initial_models.upload(caller(), header, numbered).digest)


def run_export(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Export a version."""
    with opened(config) as parts:
        deliveries = parts.use_cases.deliveries
        delivery = deliveries.find(arguments.session, arguments.version)
        model = delivery.model
        opened_chunks = deliveries.opened(caller(), delivery, 0)
        chunks: Iterator[bytes] = (data for _, data in opened_chunks)
        metadata = {
            "training_session_id": model.training_session_id,
            "version": str(model.version),
            "digest": model.digest,
            "payload_digest": model.payload_digest,
        }
        shown = progress(chunks, delivery.payload.chunk_count, "exporting")
        export_safetensors(arguments.file, manifest_of(model), shown, metadata)
    print(f"wrote version {model.version} to {arguments.file}")
    return 0


def run_status(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Show training sessions and devices."""
    with opened(config) as parts:
        sessions = parts.use_cases.training.list(PageRequest(100)).rows
        by_state, by_type = parts.use_cases.devices.counts()
    rows = [
        {
            "id": row.id,
            "name": row.name,
            "state": row.state,
            "round": row.current_round,
            "version": row.current_version,
            "best_accuracy": row.best_accuracy,
        }
        for row in sessions
    ]
    if arguments.json:
        facts = {"training_sessions": rows, "devices": {"by_state": by_state, "by_type": by_type}}
        json.dump(facts, sys.stdout, indent=2)
        print()
        return 0
    print(table(rows))
    print("devices:", ", ".join(f"{count} {state}" for state, count in by_state.items()) or "none")
    return 0
