"""`init`, `keys rotate`, `keys rotate-root`, `bundle`: the coordinator's keys and the bootstrap bundles of devices."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qflare.command_line import address, whole
from qflare.crypto.signing import algorithm_named
from qflare.files import make_private_folder
from qflare.terminal import say
from qflare_server.cli import offline_root
from qflare_server.cli.certificates import read_authorities
from qflare_server.config import ONLINE_ALGORITHMS, ROOT_ALGORITHMS, ServerConfig
from qflare_server.context import utc_now
from qflare_server.errors import AlreadyExistsError
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.root_files import given
from qflare_server.keys.rotation import as_before, replace_stolen, rotate_online, rotate_root
from qflare_server.keys.secret_files import KeyStoreError, write_secret
from qflare_server.keys.setup import SetupOptions, bootstrap_bundle, write_bootstrap
from qflare_server.keys.setup import ensure_initialized as ensure_keys
from qflare_server.keys.trust_store import read_published, trust_from_bundle
from qflare_server.serving.application import Application, open_application, open_database
from qflare_server.storage.repository import tokens
from qflare_server.storage.repository.audit import Caller, Claim
from qflare_server.storage.tables import TokenKind
from qflare_server.use_cases.access.roles import Role

ADMIN_FILE: Final = "admin.token"
FIRST_ADMIN: Final = "first"


def add(commands: Any) -> None:
    """Add this module's parsers."""
    _add_init(commands)
    _add_keys(commands)
    bundle = commands.add_parser(
        "bundle",
        help="write a bootstrap bundle for devices",
        epilog="example: qflare-server bundle --address fl.example.org:443 --output bundle.json",
    )
    bundle.add_argument(
        "--address", type=address, required=True, help="public address of the coordinator"
    )
    bundle.add_argument("--ca", type=Path, help="PEM file of the TLS certificate authority")
    bundle.add_argument("--output", type=Path, required=True, help="new 0600 file")
    bundle.set_defaults(run=run_bundle)


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="create keys, database and the first admin token",
        description="Create keys, database and the first admin token in the data folder; `serve` does the same"
        " for an empty folder.",
        epilog="examples:\n  qflare-server --data-dir /var/lib/qflare init\n"
        "  qflare-server init --root-threshold 2 --root-dir /media/a --root-dir /media/b --root-dir /media/c",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument(
        "--algorithm",
        dest="online_algorithm",
        choices=ONLINE_ALGORITHMS,
        help="algorithm of online signature keys (default: QFLARE_ONLINE_ALGORITHM, else ml-dsa-65)",
    )
    init.add_argument(
        "--root-algorithm",
        choices=ROOT_ALGORITHMS,
        help="algorithm of root keys (default: QFLARE_ROOT_ALGORITHM, else ml-dsa-87)",
    )
    init.add_argument("--root-count", type=whole(1, 8), help="number of root keys, one file each")
    init.add_argument(
        "--root-threshold",
        type=whole(1, 8),
        default=1,
        help="required root signatures (default: 1)",
    )
    init.add_argument(
        "--root-dir",
        type=Path,
        action="append",
        default=[],
        help="folder for a root key; repeatable, one folder per key",
    )
    init.add_argument(
        "--root-passphrase-file",
        type=Path,
        action="append",
        default=[],
        help="passphrase file of a root key, repeatable in the order of the keys; default: a random one beside each",
    )
    init.set_defaults(run=run_init)


def _add_keys(commands: Any) -> None:
    keys = commands.add_parser("keys", help="rotate the coordinator's keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    online = actions.add_parser("rotate", help="rotate the online keys")
    online.add_argument(
        "--stolen",
        action="store_true",
        help="the key file was stolen: stop accepting every current key",
    )
    online.add_argument(
        "--algorithm",
        dest="online_algorithm",
        choices=ONLINE_ALGORITHMS,
        help="algorithm of the next signature keys (default: QFLARE_ONLINE_ALGORITHM, else the current one)",
    )
    online.add_argument(
        "--without", action="append", default=[], metavar="KEY_ID", help="stop accepting this key"
    )
    offline_root.add_places(online)
    online.set_defaults(run=run_rotate)
    root = actions.add_parser("rotate-root", help="rotate the root keys")
    root.add_argument(
        "--algorithm",
        dest="root_algorithm",
        choices=ROOT_ALGORITHMS,
        help="algorithm of the next root keys (default: QFLARE_ROOT_ALGORITHM, else the current one)",
    )
    root.add_argument(
        "--root-count", type=whole(1, 8), help="number of root keys (default: unchanged)"
    )
    root.add_argument(
        "--root-threshold",
        type=whole(1, 8),
        help="required root signatures (default: unchanged)",
    )
    root.set_defaults(run=run_rotate_root)
    offline_root.add(actions)


def ensure_initialized(
    config: ServerConfig,
    options: SetupOptions | None = None,
    folder: KeyFolder | None = None,
) -> list[str]:
    """Create missing files in the data folder; return messages to print, empty if nothing was missing.

    Args:
        config: The configuration.
        options: Key generation options; None means the configuration's.
        folder: Folder for the keys; None means the configured folder.
    """
    folder = folder or KeyFolder.from_config(config)
    notes = []
    if ensure_keys(config, options=options, folder=folder):
        notes.append(f"made keys in {folder.directory}")
        for file in folder.held_root_files():
            shown = file.path if folder.root_files else file.path.name
            notes.append(
                f"  keep {shown} and its passphrase offline: only `keys rotate` needs them"
            )
    if not _has_admin(config):
        admin_file = config.data_dir / ADMIN_FILE
        with open_application(config) as parts:
            issue_first_admin(parts, admin_file)
        notes.append(f"wrote the first admin token to {admin_file}")
    return notes


def _has_admin(config: ServerConfig) -> bool:
    """Return whether the database has an admin token: an interrupted first start may not have issued one."""
    database = open_database(config)
    try:
        with database.read() as session:
            return tokens.has_kind(session, TokenKind.ADMIN.value)
    finally:
        database.close()


def issue_first_admin(parts: Application, path: Path) -> None:
    """Write an admin token with all roles to a file that only its owner can read.

    The file is durable before the token's row is: a start killed in between leaves an unusable token, and the next
    start writes another. If several coordinators start at once, one issues the token.
    """
    roles: Sequence[Role] = [Role.ADMIN, Role.AUDITOR]

    def hand_over(secret: str) -> None:
        make_private_folder(path.parent)
        for left in path.parent.glob(
            f".{path.name}.*"
        ):  # left by a start that was killed while writing
            left.unlink(missing_ok=True)
        write_secret(path, secret.encode() + b"\n", replace=True)

    with suppress(AlreadyExistsError):
        caller = Caller(claim=Claim("IssueAdminToken", FIRST_ADMIN, digest=""))
        parts.use_cases.tokens.issue_admin(caller, FIRST_ADMIN, roles, hand_over=hand_over)


def run_init(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Create keys, database and the first admin token."""
    folders, passphrases = arguments.root_dir, arguments.root_passphrase_file
    count = arguments.root_count or len(folders) or 1
    options = SetupOptions.from_config(config, count, arguments.root_threshold)
    if folders and len({folder.resolve() for folder in folders}) != count:
        raise KeyStoreError(
            f"got {len(folders)} folders for root keys, want {count}, each another one"
        )
    if folders:
        files = given([folder / "root.key" for folder in folders], passphrases)
        place = replace(KeyFolder.from_config(config), root_files=files)
    else:
        place = replace(KeyFolder.from_config(config), root_passphrase_files=tuple(passphrases))
        place.root_places(count)  # refuses invalid passphrases before creating anything
    notes = ensure_initialized(config, options, place)
    say("\n".join(notes) or f"{config.data_dir} is set up already")
    return 0


def run_rotate(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Rotate the online keys."""
    folder = offline_root.with_places(KeyFolder.from_config(config), arguments)
    named = config.online_algorithm
    algorithm = algorithm_named(named) if named else None
    database = open_database(config)
    try:
        if arguments.stolen:
            trust = replace_stolen(folder, database, utc_now(), algorithm=algorithm)
        else:
            without = arguments.without
            trust = rotate_online(folder, database, utc_now(), without=without, algorithm=algorithm)
    finally:
        database.close()
    say(f"keyset version {trust.keyset.version}")
    if arguments.stolen:
        say("copy the key file to every replica and start each of them again")
    return 0


def run_rotate_root(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Rotate the root keys."""
    folder = KeyFolder.from_config(config)
    ring = folder.read_online()
    database = open_database(config)
    try:
        before = as_before(read_published(database, trust_from_bundle(ring.realm, ring.bundle)))
        options = replace(
            before,
            root_algorithm=algorithm_named(config.root_algorithm)
            if config.root_algorithm
            else before.root_algorithm,
            root_count=arguments.root_count or before.root_count,
            threshold=arguments.root_threshold or before.threshold,
        )
        trust = rotate_root(folder, database, utc_now(), options)
    finally:
        database.close()
    say("root key ids:", *trust.root_key_ids())
    return 0


def run_bundle(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Write a bootstrap bundle without a token."""
    with open_application(config) as parts:
        certificates = read_authorities(arguments.ca)
        bundle = bootstrap_bundle(
            parts.keys.trust,
            arguments.address,
            certificate_authorities=certificates,
            helper_key_ids=parts.helper_key_ids,
        )
        write_bootstrap(arguments.output, bundle)
    say(f"wrote {arguments.output}")
    return 0
