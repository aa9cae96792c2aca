"""`registry import`, `registry vouch`: import devices from a JSON dump, and sign receipts for earlier imported keys."""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qflare.command_line import key_id, report_failure
from qflare.terminal import say
from qflare_server.cli.terminal import caller
from qflare_server.config import ServerConfig
from qflare_server.errors import AlreadyExistsError, ConflictError, QflareError
from qflare_server.serving.application import open_application
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.devices.administration import Devices
from qflare_server.use_cases.devices.vouching import Vouching
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices
from qflare_server.use_cases.in_process.records import read_record

logger = logging.getLogger(__name__)

BATCH: Final = 500
ATTEMPTS: Final = 5


@dataclass
class ImportCounts:
    """Counts of an import."""

    imported: int = 0
    skipped: int = 0
    invalid: int = 0
    without_keys: int = 0


def add(commands: Any) -> None:
    """Add this module's parsers."""
    registry = commands.add_parser("registry", help="import devices from an in-memory registry")
    actions = registry.add_subparsers(required=True, metavar="ACTION")
    importing = actions.add_parser(
        "import",
        help="import a JSON dump of an in-memory registry; may be repeated",
        description="Import devices that this database does not have. The dump is what"
        " get_registered_devices() returned: an object of devices by id, or a list of devices with"
        " their device_id. Safe while a coordinator runs; existing devices are skipped.",
        epilog="example: qflare-server registry import registry.json",
    )
    importing.add_argument("file", type=Path, help="JSON")
    importing.set_defaults(run=run_import)
    vouching = actions.add_parser(
        "vouch",
        help="sign receipts for keys that an embedding program registered before keys got receipts",
        description="Without arguments, lists the keys that neither a receipt nor a rotation proves to be"
        " their device's: they cannot log in, and their updates are not folded. Compare each with what the"
        " program knows of its devices, then name those that you vouch for: a key that nobody remembers may"
        " be an intruder's. Recorded in the audit log at high risk.",
        epilog="example: qflare-server registry vouch 5f0c...",
    )
    vouching.add_argument("key_id", nargs="*", type=key_id, help="id of a key, 64 hex digits")
    vouching.set_defaults(run=run_vouch)


def run_import(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Import a dump; 1 if any device was invalid."""
    try:
        entries = read_dump(json.loads(arguments.file.read_text("utf-8")))
    except RecursionError as error:
        raise ValueError(f"{arguments.file} is nested too deeply") from error
    with open_application(config) as parts:
        done = import_devices(KnownDevices(parts.context), caller(), entries)
    say(f"imported: {done.imported}  skipped: {done.skipped}  invalid: {done.invalid}")
    if done.without_keys:
        say(f"without keys, which were of no kind used here: {done.without_keys}")
    if done.invalid:
        cause = f"{done.invalid} devices were invalid; the log names each"
        remedy = "mend them in the dump and import it again"
        report_failure("qflare-server registry import", cause, remedy)
    return 1 if done.invalid else 0


def run_vouch(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Sign receipts for the named keys, or list those that have none."""
    with open_application(config) as parts:
        vouching = Vouching(parts.context)
        if not arguments.key_id:
            _list_unvouched(vouching, parts.use_cases.devices)
            return 0
        count = vouching.vouch(caller(), arguments.key_id)
    say(f"vouched for: {count}  had a receipt: {len(set(arguments.key_id)) - count}")
    return 0


def _list_unvouched(vouching: Vouching, devices: Devices) -> None:
    keys = vouching.unvouched()
    names = devices.names_of(row.device_id for row in keys)
    for row in keys:
        named = f"{names[row.device_id]} ({row.device_id})"
        state = "in use" if row.retired_at is None else "retired"
        say(f"{row.key_id}  {state}  since {row.created_at:%F %T} UTC  device {named}")
    say(f"keys without a receipt: {len(keys)}")


def read_dump(dump: object) -> list[tuple[object, object]]:
    """Return ids and records of a dump.

    Raises:
        ValueError: It is neither an object nor a list.
    """
    if isinstance(dump, dict):
        return list(dump.items())
    if isinstance(dump, list):
        return [
            (entry.get("device_id") if isinstance(entry, dict) else None, entry) for entry in dump
        ]
    raise ValueError("registry dump: want a JSON object of devices by id, or a list of devices")


def import_devices(
    use_case: KnownDevices, who: Caller, entries: Sequence[tuple[object, object]]
) -> ImportCounts:
    """Import devices, 500 per transaction; existing ones are skipped."""
    done = ImportCounts()
    for batch in _batches(_valid(entries, done)):
        inserted = _add(use_case, who, batch, done)
        done.imported += inserted
    done.skipped = len(entries) - done.imported - done.invalid
    return done


def _valid(entries: Sequence[tuple[object, object]], done: ImportCounts) -> Iterator[KnownDevice]:
    for device_id, entry in entries:
        try:
            record = read_record(device_id, entry)
        except QflareError as error:
            done.invalid += 1
            logger.warning("device %s is invalid: %s", str(device_id)[:64], error)
            continue
        done.without_keys += bool(record.unusable_keys)
        yield record.known


def _batches(known: Iterator[KnownDevice]) -> Iterator[list[KnownDevice]]:
    batch: list[KnownDevice] = []
    for device in known:
        batch.append(device)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _add(use_case: KnownDevices, who: Caller, batch: list[KnownDevice], done: ImportCounts) -> int:
    """Insert a batch; retry after a concurrent registration, one by one if a key is taken."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return use_case.add_many(who, batch)
        except ConflictError:
            if attempt == ATTEMPTS:
                raise
        except AlreadyExistsError as error:
            if len(batch) == 1:
                done.invalid += 1
                logger.warning("device %s is invalid: %s", batch[0].device_id[:64], error)
                return 0
            return sum(_add(use_case, who, [device], done) for device in batch)
    raise AssertionError("unreachable")
