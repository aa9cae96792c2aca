"""`audit verify`, `audit witness`, `model verify`: detect changes that the coordinator did not make."""

import argparse
from pathlib import Path
from typing import Any

from qflare.command_line import key_id, report_failure, whole
from qflare.terminal import say
from qflare_server.cli.terminal import REFERENCE
from qflare_server.config import ServerConfig
from qflare_server.serving.application import open_application
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.audit.witness import append
from qflare_server.verification import Recomputation, recompute_version, verify_database


def add(commands: Any) -> None:
    """Add this module's parsers; `model verify` joins the other commands on models."""
    audit = commands.add_parser("audit", help="verify the database, write witness files")
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "verify",
        help="verify the database against signed evidence; exit code 1 on any finding",
        epilog="example: qflare-server audit verify --root-key-id 5f0c... --witness heads.txt",
    )
    check.add_argument(
        "--root-key-id",
        action="append",
        type=key_id,
        help="pinned id of a root key, from a bundle you trust; default: the ids in this data folder",
    )
    check.add_argument("--no-bytes", action="store_true", help="do not hash models and updates")
    check.add_argument("--witness", type=Path, help="witness file with earlier heads")
    check.set_defaults(run=run_verify)
    witness = actions.add_parser(
        "witness",
        help="append a signed audit-log head to a witness file",
        epilog="example: qflare-server audit witness /mnt/elsewhere/heads.txt",
    )
    witness.add_argument("file", type=Path)
    witness.set_defaults(run=run_witness)


def add_model_verify(actions: Any) -> None:
    """Add `model verify`."""
    check = actions.add_parser(
        "verify",
        help="recompute a version from its stored updates and compare; exit code 1 if it differs",
        epilog="example: qflare-server model verify SESSION --version 20",
    )
    check.add_argument("session", help=REFERENCE)
    check.add_argument("--version", type=whole(0), help="default: the latest")
    check.set_defaults(run=run_recompute)


def run_verify(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Verify the database."""
    with open_application(config) as parts:
        pinned = arguments.root_key_id or parts.keys.root_key_ids
        report = verify_database(
            parts.context,
            pinned,
            read_bytes=not arguments.no_bytes,
            witness_file=arguments.witness,
        )
    for finding in report.findings:
        say(f"WRONG  {finding.kind} {finding.subject}: {finding.problem}")
    say("checked:", _counts(report.checked) or "nothing")
    if report.unchecked:
        say("not checked:", _counts(report.unchecked))
    say("verified" if not report.findings else f"{len(report.findings)} findings")
    if report.findings:
        cause = f"{len(report.findings)} findings: the database is not what was signed"
        remedy = "docs/security.md, section 12, says what to do"
        report_failure("qflare-server audit verify", cause, remedy)
    return 1 if report.findings else 0


def _counts(tally: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(tally.items()))


def run_witness(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Append the head of the audit log to a witness file."""
    with open_application(config) as parts:
        sequencer = AuditSequencer(parts.context)
        while sequencer.run_once():
            pass
        append(arguments.file, sequencer.head(fresh=True).envelope)
    say(f"appended the head to {arguments.file}")
    return 0


def run_recompute(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Recompute a version."""
    with open_application(config) as parts:
        session_id = parts.use_cases.training.find_id(arguments.session)
        result = recompute_version(parts.context, session_id, arguments.version)
    say(_verdict(result))
    if result.recomputed and not result.differences:
        return 0
    remedy = (
        "docs/security.md, section 12" if result.differences else "a version whose updates are kept"
    )
    report_failure("qflare-server model verify", _verdict(result), remedy)
    return 1


def _verdict(result: Recomputation) -> str:
    if result.differences:
        return f"version {result.version} DIFFERS: {'; '.join(result.differences)}"
    if not result.recomputed:
        pruned = f"{result.pruned_count} of {result.update_count} updates are pruned"
        return f"version {result.version} cannot be recomputed: {pruned}"
    how = ", with the judgements that are on record" if result.by_record else ""
    return f"version {result.version} recomputed from its updates: same bytes{how}"
