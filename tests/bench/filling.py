"""Databases as they look after years: many devices, a long audit log, its Merkle tree."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Final

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from qflare.crypto.merkle import CompactTree, Node
from qflare_server.storage.database import Database
from qflare_server.storage.repository import audit_tree

DEVICE_COUNT: Final = 100_000
ENTRY_COUNT: Final = 1_000_000
BATCH: Final = 50_000
FULL_PAGE: Final = 60
"""Entries of the rare event, and of each actor, whatever the length of the log: a page is always full."""

_NUMBERS: Final = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)",
    "postgresql": "WITH n(i) AS (SELECT generate_series(1, :count))",
}
_UUID: Final = {
    "sqlite": "printf('%08x-0000-4000-8000-000000000000', i)",
    "postgresql": "lpad(to_hex(i), 8, '0') || '-0000-4000-8000-000000000000'",
}
_TIME: Final = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 1700000000 + i, 'unixepoch')",
    "postgresql": "to_timestamp(1700000000 + i)",
}
_SALT: Final = {"sqlite": "randomblob(16)", "postgresql": "decode(md5(i::text), 'hex')"}
_DEVICES: Final = """
INSERT INTO devices (id, name, state, state_reason, device_type, hardware_info, network_info,
  capabilities, local_epochs, batch_size, learning_rate, key_rotation_count, registered_at,
  last_seen_at)
{numbers}
SELECT {uuid}, 'device-' || i, CASE WHEN i % 10 = 0 THEN 'suspended' ELSE 'active' END, '',
  CASE i % 4 WHEN 0 THEN 'phone' WHEN 1 THEN 'gateway' WHEN 2 THEN 'hospital' ELSE 'car' END,
  '{{"cpu": "arm64"}}', '{{}}', '{{"ram_mib": 4096}}', 1, 32, 0.01, 0, {time}, {time} FROM n
"""
_ENTRIES: Final = """
INSERT INTO audit_log (leaf_index, event_type, actor, subject, peer_address,
  authentication_method, risk_level, details, salt, created_at)
{numbers}
SELECT i - 1, CASE WHEN i % {rarity} = 0 THEN 'device.revoked' ELSE 'update.accepted' END,
  'device:' || (i % {rarity}), 'update:' || i, 'ipv4:192.0.2.1:40000', 'token',
  CASE WHEN i % {rarity} = 0 THEN 'high' ELSE 'low' END,
  '{{"round": 7, "sequence": 12}}', {salt}, {time} FROM n
"""


def fill_lists(database: Database, device_count: int, entry_count: int) -> None:
    """Insert devices and audit entries with their tree."""
    with database.engine.begin() as connection:
        _generate(connection, _DEVICES, device_count)
        _generate(connection, _ENTRIES, entry_count)
    fill_tree(database, entry_count)
    with database.engine.connect() as connection:
        connection.execute(text("ANALYZE"))
        connection.commit()


def _generate(connection: Connection, statement: str, count: int) -> None:
    dialect = connection.dialect.name
    made = statement.format(
        numbers=_NUMBERS[dialect],
        uuid=_UUID[dialect],
        time=_TIME[dialect],
        salt=_SALT[dialect],
        rarity=max(1, count // FULL_PAGE),
    )
    connection.execute(text(made.replace("%H:%M:%f", r"%H\:%M\:%f")), {"count": count})


def leaf(index: int) -> bytes:
    """Return the leaf hash that stands for an entry."""
    return hashlib.sha256(index.to_bytes(8)).digest()


def fill_tree(database: Database, count: int) -> bytes:
    """Insert the nodes of a tree over so many leaves and return its root."""
    tree = CompactTree()

    def nodes() -> Iterator[Node]:
        return chain.from_iterable(tree.append(leaf(index)) for index in range(count))

    remaining = nodes()
    while batch := list(islice(remaining, BATCH)):
        database.write(_inserting(batch))
    return tree.root()


def _inserting(batch: list[Node]) -> Callable[[Session], None]:
    return lambda session: audit_tree.insert_nodes(session, batch)
