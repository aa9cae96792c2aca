"""`status`: show training sessions, devices and the keyset."""

import argparse
import json
from datetime import datetime
from typing import Any

from qflare.references import short_id
from qflare.terminal import say
from qflare_server.cli.terminal import table
from qflare_server.config import ServerConfig
from qflare_server.context import KeysetStatus
from qflare_server.serving.application import open_application
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import Device
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.training.objective import objective_of


def add(commands: Any) -> None:
    """Add this module's parser."""
    status = commands.add_parser(
        "status",
        help="show training sessions, devices and the keyset",
        epilog="example: qflare-server status",
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=run_status)


def run_status(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Show training sessions, devices and the keyset."""
    with open_application(config) as parts:
        sessions = parts.use_cases.training.list(PageRequest(100)).rows
        by_state, by_type = parts.use_cases.devices.counts()
        devices = parts.use_cases.devices.list(PageRequest(100), DeviceFilter()).rows
        keyset, now = parts.keys.status(), parts.context.clock()
    rows = [
        {
            "id": row.id,
            "name": row.name,
            "state": row.state,
            "round": row.current_round,
            "version": row.current_version,
            "best": row.best_value,
            "best_version": row.best_version,
            "metric": f"{objective.metric} ({objective.data})",
        }
        for row in sessions
        for objective in (objective_of(row.config),)
    ]
    if arguments.json:
        facts = {
            "training_sessions": rows,
            "devices": {
                "by_state": by_state,
                "by_type": by_type,
                "listed": [{"id": row.id, "name": row.name, "state": row.state} for row in devices],
            },
            "keyset": {
                "version": keyset.version,
                "expires_at": keyset.expires_at.isoformat(),
                "expires_soon": keyset.expires_soon(now),
            },
        }
        say(json.dumps(facts, indent=2))
        return 0
    say(table(rows))
    say()
    if devices:
        say(table([_device(row) for row in devices]))
    say("devices:", ", ".join(f"{count} {state}" for state, count in by_state.items()) or "none")
    say(_keyset_line(keyset, now))
    return 0


def _device(row: Device) -> dict[str, Any]:
    return {
        "name": row.name,
        "id": short_id(row.id),
        "state": row.state,
        "type": row.device_type or None,
        "last seen": f"{row.last_seen_at:%F %T} UTC" if row.last_seen_at else None,
    }


def _keyset_line(keyset: KeysetStatus, now: datetime) -> str:
    """Return version and expiry of the keyset, with what to do from `EXPIRY_WARNING` before its expiry on."""
    line = f"keyset: version {keyset.version}, expires {keyset.expires_at:%Y-%m-%d}"
    if not keyset.expires_soon(now):
        return line
    days = (keyset.expires_at - now).days
    left = f"in {days} days" if days >= 0 else "expired"
    return f"{line} ({left}): run qflare-server keys rotate"
