"""Commands on the audit log: list, export, prove."""

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qflare.command_line import whole
from qflare.references import party
from qflare.terminal import say
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.arguments import add_command, add_limit, add_topic, choice, show, show_list
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, as_json, moment, note, parse_moment, word

RISKS = choice(pb.RiskLevel, "RISK_LEVEL_")
ENTRY: list[Column] = [
    ("id", lambda row: row.audit_id),
    ("time", lambda row: moment(row, "create_time")),
    ("risk", lambda row: word(row, "risk_level")),
    ("event", lambda row: row.event_type),
    ("actor", lambda row: party(row.actor, row.actor_name)),
    ("subject", lambda row: party(row.subject, row.subject_name)),
    ("from", lambda row: row.peer_address),
    ("details", lambda row: " ".join(f"{k}={v}" for k, v in sorted(row.details.items()))),
]


EVIDENCE: list[Column] = [
    ("id", lambda row: row.audit_id),
    ("time", lambda row: moment(row, "create_time")),
    ("event", lambda row: row.event_type),
    ("actor", lambda row: row.actor),
    ("subject", lambda row: row.subject),
    ("leaf", lambda row: row.proof.leaf_index),
    ("tree size", lambda row: row.proof.tree_size),
    ("path", lambda row: " ".join(row.proof.sibling_digests)),
]


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "audit", "the audit log")
    listing = add_command(
        actions, "list", run_list, "list entries, newest first", "audit list --risk high"
    )
    _add_filters(listing)
    add_limit(listing)
    export = add_command(
        actions,
        "export",
        run_export,
        "export entries as JSON lines, oldest first",
        "audit export --since 2026-01-01 --output audit.jsonl",
    )
    _add_filters(export)
    export.add_argument(
        "--after", type=whole(0, 2**62), default=0, help="number of the last known entry"
    )
    export.add_argument("--output", type=Path, help="write to this new 0600 file")
    proof = add_command(
        actions, "proof", run_proof, "fetch the inclusion proof of an entry", "audit proof 17"
    )
    proof.add_argument("entry", type=whole(1, 2**62), help="number of the entry")
    proof.add_argument("--tree-size", type=whole(1, 2**62), help="log size for the proof")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", type=parse_moment, help="ISO 8601 time")
    parser.add_argument("--until", type=parse_moment, help="ISO 8601 time")
    parser.add_argument("--actor", default="", help="such as admin:alice or device:ward-3")
    parser.add_argument("--subject", default="", help="such as training_session:digits")
    parser.add_argument("--event", default="", help="such as device.revoked")
    parser.add_argument("--risk", choices=sorted(RISKS), help="only entries of this risk level")


def _filters(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "start_time": options.since,
        "end_time": options.until,
        "actor": options.actor,
        "subject": options.subject,
        "event_type": options.event,
        "risk_level": RISKS[options.risk] if options.risk else 0,
    }


def run_proof(admin: Admin, options: argparse.Namespace) -> None:
    """Fetch the inclusion proof of an entry."""
    request = pb.GetAuditProofRequest(audit_id=options.entry, tree_size=options.tree_size)
    answer = admin.call("GetAuditProof", request)
    show(options, answer, answer.entry, EVIDENCE)


def run_list(admin: Admin, options: argparse.Namespace) -> None:
    """List entries."""
    request = pb.ListAuditEntriesRequest(**_filters(options))
    answer = admin.collect("ListAuditEntries", request, "entries", options.limit)
    show_list(options, answer, "entries", ENTRY)


def run_export(admin: Admin, options: argparse.Namespace) -> None:
    """Export entries as JSON lines."""
    request = pb.ExportAuditEntriesRequest(**_filters(options), after_audit_id=options.after)
    count = 0
    with ExitStack() as stack:
        file = None
        if options.output is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            file = stack.enter_context(os.fdopen(os.open(options.output, flags, 0o600), "w"))
        for batch in admin.receive("ExportAuditEntries", request):
            for entry in batch.entries:
                say(json.dumps(as_json(entry)), stream=file)
                count += 1
    note(f"exported {count} entries")
