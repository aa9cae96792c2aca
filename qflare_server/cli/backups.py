"""`backup`, `restore`: back up a coordinator and restore it."""

import argparse
from pathlib import Path
from typing import Any

from qflare.terminal import say
from qflare_server.config import ServerConfig
from qflare_server.keys.folder import key_directory
from qflare_server.storage.backups import Manifest, back_up, restore


def add(commands: Any) -> None:
    """Add this module's parsers."""
    backup = commands.add_parser(
        "backup",
        help="back up database, payloads and keys while the coordinator runs",
        epilog="example: qflare-server backup backups/2030-01-01",
    )
    backup.add_argument("folder", type=Path, help="folder to create")
    backup.set_defaults(run=run_backup)
    restoring = commands.add_parser(
        "restore",
        help="restore a backup; overwrites nothing",
        epilog="example: qflare-server --data-dir restored restore backups/2030-01-01",
    )
    restoring.add_argument("folder", type=Path, help="folder that `backup` created")
    restoring.set_defaults(run=run_restore)


def run_backup(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Back up database, payloads and keys."""
    manifest = back_up(config, key_directory(config), arguments.folder)
    say(f"{arguments.folder}: {_summary(manifest)}")
    if config.key_passphrase_file is not None:
        say(f"not included: the passphrase in {config.key_passphrase_file}")
    if config.object_store_url:
        say(f"not included: the payloads in {config.object_store_url}")
    return 0


def run_restore(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Restore a backup."""
    manifest = restore(config, key_directory(config), arguments.folder)
    say(f"restored the backup of {manifest.created_at}: {_summary(manifest)}")
    if config.object_store_url:
        say(
            "next: stop the original, then: qflare-server payloads verify; qflare-server payloads claim"
        )
    say("next: qflare-server audit verify, with the same --data-dir or QFLARE_DATABASE_URL")
    return 0


def _summary(manifest: Manifest) -> str:
    count = len(manifest.files)
    return f"{count} files, {manifest.size_bytes / 2**20:.1f} MiB, schema {manifest.schema}"
