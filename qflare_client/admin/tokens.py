"""Commands on tokens: issue, issue-admin, list, revoke. Secrets go to standard output or to a new 0600 file."""

import argparse
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from qflare.command_line import seconds, whole
from qflare.files import make_private_folder
from qflare.references import short_id
from qflare.terminal import say
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.access.enrollment import read_bundle
from qflare_client.admin.arguments import (
    add_command,
    add_limit,
    add_topic,
    choice,
    show,
    show_list,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, moment, note, parse_seconds, print_json, word
from qflare_client.errors import InvalidRequestError

ROLES = ("admin", "auditor", "operator", "viewer")
KINDS = choice(pb.TokenKind, "TOKEN_KIND_")
TOKEN: list[Column] = [
    ("id", lambda row: row.token_id),
    ("kind", lambda row: word(row, "kind")),
    ("subject", lambda row: short_id(row.subject)),
    ("device", lambda row: row.device_name),
    ("roles", lambda row: ",".join(row.roles)),
    ("groups", lambda row: ",".join(row.groups)),
    ("created", lambda row: moment(row, "create_time")),
    ("expires", lambda row: moment(row, "expire_time")),
    ("used", lambda row: moment(row, "use_time")),
    ("last used", lambda row: moment(row, "last_use_time")),
    ("revoked", lambda row: moment(row, "revoke_time")),
]


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "token", "enrollment and admin tokens")
    issue = add_command(
        actions,
        "issue",
        run_issue,
        "issue enrollment tokens",
        "token issue --count 10 --label ward-3 --bundle bundle.json --bundles bundles",
    )
    issue.add_argument(
        "--count", type=whole(1, 1000), default=1, help="number of tokens, 1 to 1000"
    )
    issue.add_argument("--label", default="", help="becomes the name of the device")
    issue.add_argument(
        "--group", action="append", default=[], help="group of new devices; repeatable"
    )
    issue.add_argument("--lifetime-s", type=seconds(1), help="lifetime in seconds (a day)")
    add_hand_over(issue)
    administrator = add_command(
        actions,
        "issue-admin",
        run_issue_admin,
        "issue an admin token",
        "token issue-admin --name alice --role operator --output alice.token",
    )
    administrator.add_argument("--name", required=True, help="name of its owner")
    administrator.add_argument("--role", action="append", choices=ROLES, required=True)
    administrator.add_argument(
        "--lifetime-s", type=seconds(1), help="lifetime in seconds (unlimited)"
    )
    add_hand_over(administrator, enrolling=False)
    listing = add_command(actions, "list", run_list, "list tokens", "token list --kind admin")
    listing.add_argument("--kind", choices=sorted(KINDS), help="only tokens of this kind")
    add_limit(listing)
    revoke = add_command(actions, "revoke", run_revoke, "revoke a token", "token revoke ID")
    revoke.add_argument("token", metavar="ID")
    revoke.add_argument("--reason", default="", help="for the audit log")


def add_hand_over(parser: argparse.ArgumentParser, *, enrolling: bool = True) -> None:
    """Add the output options of secrets; enrollment tokens can be written into bundles."""
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", type=Path, help="write secrets to this new 0600 file")
    if enrolling:
        target.add_argument(
            "--bundles",
            type=Path,
            help="write a bootstrap bundle per token into this folder, based on --bundle",
        )
        parser.add_argument(
            "--bundle", type=Path, help="bundle without a token, made by qflare-server bundle"
        )


def hand_over(
    options: argparse.Namespace, answer: Message, issued: Sequence[pb.IssuedToken]
) -> None:
    """Print secrets, or write them to a new 0600 file."""
    if getattr(options, "bundles", None) is not None:
        _write_bundles(options, issued)
    elif options.output is not None:
        _write_private(options.output, "".join(f"{item.secret}\n" for item in issued))
        note(f"wrote {len(issued)} secrets to {options.output}")
    elif options.json:
        print_json(answer)
    else:
        say("\n".join(item.secret for item in issued))


def check_bundle(options: argparse.Namespace) -> None:
    """Check the bundle options before a token is issued.

    Raises:
        KeyStoreError: The bundle cannot be read.
        InvalidRequestError: --bundles is given without --bundle.
    """
    if options.bundles is not None and options.bundle is None:
        raise InvalidRequestError("--bundles needs --bundle")
    if options.bundle is not None:
        read_bundle(options.bundle)


def _write_bundles(options: argparse.Namespace, issued: Sequence[pb.IssuedToken]) -> None:
    """Write a bundle with token per device, each to its own 0600 file."""
    bundle = read_bundle(options.bundle)
    make_private_folder(options.bundles)
    for item in issued:
        bundle.enrollment_token = item.secret
        text = json_format.MessageToJson(bundle)
        _write_private(options.bundles / f"{item.token.token_id}.json", f"{text}\n")
    note(f"wrote {len(issued)} bundles to {options.bundles}")


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def run_issue(admin: Admin, options: argparse.Namespace) -> None:
    """Issue enrollment tokens."""
    check_bundle(options)
    request = pb.IssueEnrollmentTokensRequest(
        token_count=options.count,
        label=options.label,
        request_id=uuid.uuid4().hex,
        groups=options.group,
    )
    if options.lifetime_s is not None:
        request.lifetime.CopyFrom(parse_seconds(options.lifetime_s))
    answer = admin.call("IssueEnrollmentTokens", request)
    hand_over(options, answer, list(answer.tokens))


def run_issue_admin(admin: Admin, options: argparse.Namespace) -> None:
    """Issue an admin token."""
    request = pb.IssueAdminTokenRequest(
        name=options.name, roles=options.role, request_id=uuid.uuid4().hex
    )
    if options.lifetime_s is not None:
        request.lifetime.CopyFrom(parse_seconds(options.lifetime_s))
    answer = admin.call("IssueAdminToken", request)
    hand_over(options, answer, [answer.token])


def run_list(admin: Admin, options: argparse.Namespace) -> None:
    """List tokens."""
    request = pb.ListTokensRequest()
    if options.kind:
        request.kind = KINDS[options.kind]  # type: ignore[assignment]
    answer = admin.collect("ListTokens", request, "tokens", options.limit)
    show_list(options, answer, "tokens", TOKEN)


def run_revoke(admin: Admin, options: argparse.Namespace) -> None:
    """Revoke a token."""
    request = pb.RevokeTokenRequest(token_id=options.token, reason=options.reason)
    answer = admin.call("RevokeToken", request)
    show(options, answer, answer.token, TOKEN)
