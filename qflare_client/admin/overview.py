"""The `status` command: the state of the coordinator."""

import argparse
from typing import Any

from qflare.terminal import say
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.arguments import add_command
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import (
    Column,
    facts,
    moment,
    optional,
    print_json,
    size,
    span,
    table,
)

STATUS: list[Column] = [
    ("version", lambda row: row.version),
    ("time", lambda row: moment(row, "server_time")),
    ("database", lambda row: f"{row.database.dialect}, schema {row.database.schema_revision}"),
    ("latency", lambda row: span(row.database, "latency")),
    (
        "connections",
        lambda row: f"{row.database.pool_in_use_count}/{row.database.pool_size} in use",
    ),
    ("database size", lambda row: size(row.storage.database_bytes)),
    ("payload store", lambda row: size(row.storage.payload_store_bytes)),
    (
        "payloads",
        lambda row: (
            f"{row.storage.payload_count} kept ({size(row.storage.payload_bytes)}), "
            f"{row.storage.pruned_payload_count} deleted"
        ),
    ),
    ("disk free", lambda row: _free(row.storage)),
    ("devices", lambda row: _counts(row.device_counts)),
    ("training sessions", lambda row: _counts(row.training_session_counts)),
    ("rounds open", lambda row: row.queues.open_round_count),
    ("rounds waiting", lambda row: row.queues.closed_round_count),
    ("oldest waiting", lambda row: span(row.queues, "oldest_closed_round_age")),
    ("updates pending", lambda row: row.queues.pending_update_count),
    ("uploads unfinished", lambda row: row.queues.unfinished_upload_count),
    ("audit unsequenced", lambda row: row.queues.unsequenced_audit_count),
    ("watchers", lambda row: row.watcher_count),
]
REPLICA: list[Column] = [
    ("replica", lambda row: row.replica_id),
    ("address", lambda row: row.address),
    ("version", lambda row: row.version),
    ("started", lambda row: moment(row, "start_time")),
    ("last seen", lambda row: moment(row, "last_seen_time")),
]


def _counts(counts: Any) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in sorted(counts)) or "none"


def _free(storage: Any) -> str | None:
    free = optional(storage, "free_bytes")
    return None if free is None else size(storage.free_bytes)


def add(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands, "status", run_status, "show the state of the coordinator", "status --json"
    )


def run_status(admin: Admin, options: argparse.Namespace) -> None:
    """Show the state of the coordinator."""
    answer = admin.call("GetCoordinatorStatus", pb.GetCoordinatorStatusRequest())
    if options.json:
        print_json(answer)
        return
    say(facts(answer, STATUS))
    say()
    say(table(answer.replicas, REPLICA))
