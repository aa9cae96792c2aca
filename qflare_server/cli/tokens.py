"""`token`: issue enrollment and admin tokens."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qflare.command_line import address, seconds, whole
from qflare.files import make_private_folder
from qflare.terminal import say
from qflare_server.cli.certificates import read_authorities
from qflare_server.cli.terminal import REFERENCE, caller
from qflare_server.config import ServerConfig
from qflare_server.keys.setup import bootstrap_bundle, write_bootstrap
from qflare_server.serving.application import Application, open_application
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.access.tokens import IssuedToken


def add(commands: Any) -> None:
    """Add this module's parsers."""
    token = commands.add_parser("token", help="issue enrollment and admin tokens")
    actions = token.add_subparsers(required=True, metavar="ACTION")
    issue = actions.add_parser(
        "issue",
        help="issue enrollment tokens",
        epilog="example: qflare-server token issue --count 10 --label ward-3 --output tokens.txt",
    )
    issue.add_argument(
        "--count", type=whole(1, 1000), default=1, help="number of tokens (1 to 1000)"
    )
    issue.add_argument("--label", default="", help="becomes the name of the device")
    issue.add_argument(
        "--group", action="append", default=[], help="group of the new devices; repeatable"
    )
    issue.add_argument("--lifetime-s", type=seconds(1), help="lifetime in seconds")
    issue.add_argument(
        "--device", default="", help=f"replace the keys of this device: its {REFERENCE}"
    )
    issue.add_argument(
        "--bundles", type=Path, help="write a bootstrap bundle per token into this folder"
    )
    issue.add_argument(
        "--address", type=address, help="public address of the coordinator, for --bundles"
    )
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
    admin.add_argument("--name", required=True, help="name of the administrator")
    roles = sorted({Role.VIEWER, Role.OPERATOR, Role.ADMIN, Role.AUDITOR})
    admin.add_argument("--role", action="append", choices=roles, required=True, help="repeatable")
    admin.add_argument("--lifetime-s", type=seconds(1), help="lifetime in seconds")
    admin.add_argument(
        "--output", type=Path, help="write to this new 0600 file instead of printing"
    )
    admin.set_defaults(run=run_issue_admin)


def run_issue(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Issue enrollment tokens."""
    with open_application(config) as parts:
        named = arguments.device
        device_id = parts.use_cases.devices.find_id(named) if named else ""
        issued = parts.use_cases.tokens.issue_enrollment(
            caller(),
            count=arguments.count,
            label=arguments.label,
            lifetime_s=arguments.lifetime_s,
            device_id=device_id,
            groups=arguments.group,
        )
        if arguments.bundles is not None:
            _write_bundles(parts, issued, arguments)
            return 0
    _hand_out([item.secret for item in issued], arguments.output)
    return 0


def _write_bundles(
    parts: Application, issued: Sequence[IssuedToken], arguments: argparse.Namespace
) -> None:
    """Write a bootstrap bundle with a token for each device, each to its own 0600 file."""
    certificates = read_authorities(arguments.ca)
    address = arguments.address or parts.config.listen
    make_private_folder(arguments.bundles)
    for item in issued:
        bundle = bootstrap_bundle(
            parts.keys.trust,
            address,
            enrollment_token=item.secret,
            certificate_authorities=certificates,
            helper_key_ids=parts.helper_key_ids,
        )
        write_bootstrap(arguments.bundles / f"{item.token.id}.json", bundle)
    say(f"wrote {len(issued)} bundles to {arguments.bundles}")


def run_issue_admin(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Issue an admin token."""
    with open_application(config) as parts:
        roles = [Role(role) for role in arguments.role]
        issued = parts.use_cases.tokens.issue_admin(
            caller(), arguments.name, roles, arguments.lifetime_s
        )
    _hand_out([issued.secret], arguments.output)
    return 0


def _hand_out(secrets: list[str], output: Path | None) -> None:
    """Print secrets, or write them to a new 0600 file."""
    if output is None:
        say("\n".join(secrets))
        return
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("\n".join(secrets) + "\n")
    say(f"wrote {len(secrets)} tokens to {output}")
