"""`payloads move`, `verify` and `claim`: move and verify large payloads; take over a folder or bucket of them."""

import argparse
from collections import Counter
from typing import Any

from qflare.command_line import report_failure
from qflare.terminal import say
from qflare_server.config import ServerConfig
from qflare_server.serving.application import open_application
from qflare_server.storage.payload_store import STORE_NAMES
from qflare_server.storage.place_ownership import claim
from qflare_server.use_cases.payload_moves import PayloadMover
from qflare_server.verification.payload_stores import verify_payloads

PROGRAM = "qflare-server payloads"


def add(commands: Any) -> None:
    """Add this module's parsers."""
    payloads = commands.add_parser(
        "payloads", help="move, verify or take over large models and updates"
    )
    actions = payloads.add_subparsers(required=True, metavar="ACTION")
    move = actions.add_parser(
        "move",
        help="move payloads to another payload store while coordinators run; can be repeated",
        epilog="example: qflare-server payloads move --to files",
    )
    move.add_argument("--to", required=True, choices=STORE_NAMES, help="payload store")
    move.set_defaults(run=run_move)
    verify = actions.add_parser(
        "verify",
        help="check that every payload is present and unaltered; exit code 1 if one is not",
        epilog="example: qflare-server payloads verify",
    )
    verify.set_defaults(run=run_verify)
    takeover = actions.add_parser(
        "claim",
        help="make a restored or copied database the owner of its payload folder or bucket; stop the original first",
        epilog="example: qflare-server payloads claim",
    )
    takeover.set_defaults(run=run_claim)


def run_move(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Move all payloads to one payload store."""
    with open_application(config) as parts:
        report = PayloadMover(parts.context, arguments.to).run()
    say(f"moved to {arguments.to}: {report.moved_count} payloads, {_mebibytes(report.moved_bytes)}")
    if arguments.to != parts.context.store.name:
        say(f"new payloads still go to {parts.context.store.name}: set QFLARE_PAYLOAD_STORE")
    for payload_id in report.skipped:
        say(f"NOT MOVED  {payload_id}")
    if not report.skipped:
        return 0
    cause = f"{len(report.skipped)} payloads were not moved: they are damaged or changed meanwhile"
    report_failure(f"{PROGRAM} move", cause, "qflare-server payloads verify")
    return 1


def run_verify(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Verify all payloads in payload stores."""
    del arguments
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    wrong = 0
    with open_application(config) as parts:
        for verdict in verify_payloads(parts.context):
            counts[verdict.store] += 1
            sizes[verdict.store] += verdict.size_bytes
            if verdict.problem:
                wrong += 1
                say(f"WRONG  {verdict.payload_id} in {verdict.store}: {verdict.problem}")
    for store in sorted(counts):
        say(f"{store}: {counts[store]} payloads, {_mebibytes(sizes[store])}")
    say("verified" if not wrong else f"{wrong} findings")
    if wrong:
        remedy = "restore the payload store from a backup"
        report_failure(f"{PROGRAM} verify", f"{wrong} payloads are missing or altered", remedy)
    return 1 if wrong else 0


def run_claim(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Make the database the owner of the folders and buckets of its payload stores."""
    del arguments
    with open_application(config) as parts:
        for store in parts.context.stores:
            claim(parts.database, store)
            say(f"{store.name}: owned by this database")
    return 0


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
