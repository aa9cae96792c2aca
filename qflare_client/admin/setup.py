"""Local commands: connection profile and shell completion."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflare.command_line import address
from qflare.terminal import say
from qflare_client.admin.arguments import add_topic
from qflare_client.admin.extras import require
from qflare_client.admin.output import Column, facts, note
from qflare_client.admin.profile import profile_path, read_private, read_profile, write_profile

PROFILE: list[Column] = [
    ("address", lambda row: row.address),
    ("ca file", lambda row: row.ca_file),
    ("certificate file", lambda row: row.certificate_file),
    ("key file", lambda row: row.key_file),
    ("server name", lambda row: row.server_name),
    ("token file", lambda row: row.token_file),
    ("token", lambda row: "set" if row.token else None),
    ("insecure", lambda row: row.insecure),
    ("issuer", lambda row: row.issuer),
    ("client id", lambda row: row.client_id),
    ("resource", lambda row: row.resource),
    ("issuer ca file", lambda row: row.issuer_ca_file),
    ("refresh token", lambda row: "set" if row.refresh_token else None),
]
FILES = ("ca_file", "certificate_file", "key_file", "token_file")
SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any, root: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the commands of this topic; `root` returns the parser of the whole program."""
    actions = add_topic(commands, "profile", "connection profile: address, TLS files and token")
    setting = actions.add_parser(
        "set",
        help="write the profile; omitted settings stay unchanged",
        epilog="example:\n  qflare-admin profile set --address host:50051 --ca ca.pem --token-file admin.token",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    setting.add_argument("--address", type=address, help="host:port")
    setting.add_argument(
        "--ca", dest="ca_file", help="PEM certificate authorities of the coordinator"
    )
    setting.add_argument("--certificate", dest="certificate_file", help="PEM, for mutual TLS")
    setting.add_argument("--key", dest="key_file", help="PEM, for mutual TLS")
    setting.add_argument(
        "--server-name",
        help="name in the coordinator's certificate, if it differs from the address",
    )
    setting.add_argument("--insecure", action="store_true", default=None, help="use plaintext")
    token = setting.add_mutually_exclusive_group()
    token.add_argument("--token-file", help="file with the token")
    token.add_argument(
        "--token-stdin",
        action="store_true",
        help="read the token from standard input and store it in the profile",
    )
    setting.set_defaults(offline=run_set)
    shown = actions.add_parser("show", help="show the profile, without the token")
    shown.set_defaults(offline=run_show)
    completion = commands.add_parser(
        "completion",
        help="print a completion script for a shell (needs qflare[admin])",
        epilog="example:\n  qflare-admin completion bash > ~/.local/share/bash-completion/completions/qflare-admin",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(offline=lambda options: run_completion(options, root()))


def run_set(options: argparse.Namespace) -> None:
    """Write the profile."""
    path = profile_path(os.environ)
    names = ("address", "server_name", "insecure", *FILES)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in FILES:
        if given.get(name):
            given[name] = str(Path(str(given[name])).expanduser().absolute())
    if "token_file" in given:
        read_private(Path(str(given["token_file"])))
        given["token"] = ""
    if options.token_stdin:
        given |= {"token": sys.stdin.readline().strip(), "token_file": ""}
    write_profile(path, replace(read_profile(path), **given))
    note(f"wrote {path}")


def run_show(_options: argparse.Namespace) -> None:
    """Show the profile."""
    say(facts(read_profile(profile_path(os.environ)), PROFILE))


def run_completion(options: argparse.Namespace, root: argparse.ArgumentParser) -> None:
    """Print a completion script."""
    print(require("shtab", "admin").complete(root, options.shell))  # noqa: T201  # a script has tabs
