"""Audit-log sequencer: appends committed entries to the Merkle tree and signs tree heads.

Calls only insert rows; they never wait for the tree. The sequencer appends committed rows afterwards in batches, in
the order of their ids. One transaction writes a batch's leaves and the nodes that it completes. On PostgreSQL ids
become visible out of order: a row whose transaction commits after that of a higher id gets a later leaf. Leaf order is
the order of visibility, id order that of insertion; no row is lost.

Several coordinators may run sequencers: a row lock lets one work at a time, and the unique keys of leaves and nodes
prevent duplicates. A crash rolls back the whole batch, and the next pass repeats it.

A head is signed at most every ten seconds, or on request, or when the key of the latest has left the keyset. The last
head of each hour is kept.
"""

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto.merkle import Node
from qflare.evidence.audit_entries import Entry, InvalidEntryError, detail_texts
from qflare.times import timestamp_of
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import ConflictError
from qflare_server.storage.records import AuditHead, AuditLog
from qflare_server.storage.repository import audit_tree
from qflare_server.use_cases.audit import witness

logger = logging.getLogger(__name__)

BATCH: Final = 256  # entries per transaction; on SQLite it holds the write lock for 5 ms
MAX_IDLE: Final = 8  # consecutive empty passes before a waiting caller gives up
HEAD_INTERVAL: Final = timedelta(seconds=10)
ORIGIN_SUFFIX: Final = "/audit"


@dataclass(frozen=True)
class SignedHead:
    """A signed head of the tree.

    Attributes:
        size: Number of entries.
        root: Merkle root over them, 32 bytes.
        envelope: A signed ``TreeHead``.
        created_at: When it was signed.
    """

    size: int
    root: bytes
    envelope: security_pb2.SignedEnvelope
    created_at: datetime


def origin_of(realm: str) -> str:
    """Return the origin of a realm's audit log, as stated in its heads."""
    return realm + ORIGIN_SUFFIX


def entry_of(row: AuditLog) -> Entry:
    """Return the entry that a row's leaf commits to."""
    return Entry(
        audit_id=row.id,
        event_type=row.event_type,
        actor=row.actor,
        subject=row.subject,
        peer_address=row.peer_address,
        authentication_method=row.authentication_method,
        risk_level=row.risk_level,
        details=detail_texts(row.details),
        created_at=row.created_at,
        salt=row.salt,
    )


def head_of(row: AuditHead) -> SignedHead:
    """Return a stored head."""
    envelope = security_pb2.SignedEnvelope.FromString(row.signature)
    envelope.payload = row.statement
    return SignedHead(row.size, row.root, envelope, row.created_at)


def _leaf_of(row: AuditLog) -> bytes | None:
    """Return a row's leaf hash. Logs an error and returns None for a row this program cannot have written."""
    try:
        return entry_of(row).leaf_hash()
    except InvalidEntryError as error:
        logger.error("audit entry cannot be sequenced: id=%d: %s", row.id, error)  # noqa: TRY400
        return None


class AuditSequencer:
    """Sequences audit entries and signs tree heads; thread-safe, and several may run at once.

    Args:
        context: The coordinator's components.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def run_once(self) -> int:
        """Sequence every committed entry and sign a head if one is due; return the number of sequenced entries.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        placed = self._place_all(wait=False)
        with self._context.database.read() as session:
            leaf_count = audit_tree.size(session)
            latest = audit_tree.latest_head(session)
        is_outdated = latest is not None and not self._is_accepted(latest)
        if leaf_count > 0 and self._is_due(leaf_count, latest, fresh=is_outdated):
            self._sign()
        return placed

    def head(self, *, fresh: bool = False) -> SignedHead:
        """Return a signed head.

        Args:
            fresh: Require a head that covers every committed entry; otherwise it may be up to ten seconds old, unless
                the key that signed it has left the keyset meanwhile.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        if fresh:
            self._place_all(wait=True)
        with self._context.database.read() as session:
            leaf_count = audit_tree.size(session)
            latest = audit_tree.latest_head(session)
        if latest is not None and not fresh and not self._is_accepted(latest):
            return self.head(fresh=True)  # covers the entry of the keyset that dropped the key
        if latest is not None and not self._is_due(leaf_count, latest, fresh=fresh):
            return head_of(latest)
        return self._sign()

    def _is_accepted(self, head: AuditHead) -> bool:
        envelope = head_of(head).envelope
        return self._context.signer.accepts(security_pb2.KEY_ROLE_LOG, envelope)

    def _is_due(self, leaf_count: int, latest: AuditHead | None, *, fresh: bool = False) -> bool:
        if latest is None:
            return True
        if latest.size >= leaf_count:
            return False
        return fresh or self._context.clock() - latest.created_at >= HEAD_INTERVAL

    def _place_all(self, *, wait: bool) -> int:
        """Sequence the entries committed so far, or return if another sequencer is running.

        Entries committed during the pass wait for the next one; including them would cost a transaction for every few
        entries.
        """
        total = idle = 0
        while idle < (MAX_IDLE if wait else 1):
            leaves, is_last = self._next_leaves()
            if not leaves:
                break
            placed = self._place(leaves, wait=wait)
            total += placed
            idle = 0 if placed else idle + 1
            if placed and is_last:
                break
        return total

    def _next_leaves(self) -> tuple[list[tuple[int, bytes]], bool]:
        """Return ids and leaf hashes of the next batch, and whether it is currently the last one.

        Rows never change, so the read holds no transaction.
        """
        with self._context.database.read() as session:
            rows = audit_tree.pending(session, BATCH)
        hashed = [(row.id, _leaf_of(row)) for row in rows]
        leaves = [(audit_id, leaf) for audit_id, leaf in hashed if leaf is not None]
        return leaves, len(rows) < BATCH

    def _place(self, leaves: list[tuple[int, bytes]], *, wait: bool) -> int:
        """Append a batch; return 0 if another sequencer appended it first."""
        try:
            return self._context.database.write(
                lambda session: self._grow(session, leaves, wait=wait)
            )
        except ConflictError:
            logger.debug("another sequencer was faster")
            return 0

    def _grow(self, session: Session, leaves: list[tuple[int, bytes]], *, wait: bool) -> int:
        if not audit_tree.lock(session, self._context.clock(), wait=wait):
            return 0
        waiting = audit_tree.still_pending(session, [audit_id for audit_id, _ in leaves])
        tree = audit_tree.compact_tree(session, audit_tree.size(session))
        placed: list[tuple[int, int, bytes]] = []
        nodes: list[Node] = []
        for audit_id, leaf in leaves:
            if audit_id in waiting:
                placed.append((tree.size, audit_id, leaf))
                nodes.extend(tree.append(leaf))
        if placed:
            audit_tree.place(session, placed)
            audit_tree.insert_nodes(session, nodes)
        return len(placed)

    def _sign(self) -> SignedHead:
        """Sign a head of the current tree outside of any transaction, and store it."""
        with self._context.database.read() as session:
            leaf_count = audit_tree.size(session)
            root = audit_tree.compact_tree(session, leaf_count).root()
        at = self._context.clock()
        statement = security_pb2.TreeHead(
            origin=origin_of(self._context.config.realm),
            size=leaf_count,
            root_digest=root.hex(),
            create_time=timestamp_of(at),
        )
        payload = statement.SerializeToString(deterministic=True)
        envelope = self._context.signer.sign(security_pb2.KEY_ROLE_LOG, payload)
        return self._keep(SignedHead(leaf_count, root, envelope, at))

    def _keep(self, head: SignedHead) -> SignedHead:
        """Store a head unless one of its size exists, and delete the earlier ones of its hour."""

        def work(session: Session) -> SignedHead | None:
            known = audit_tree.get_head(session, head.size)
            if known is not None:
                return head_of(known)
            hour = head.created_at.replace(minute=0, second=0, microsecond=0)
            audit_tree.drop_heads(session, hour, head.size)
            audit_tree.insert_head(
                session,
                {
                    "size": head.size,
                    "root": head.root,
                    "statement": head.envelope.payload,
                    "signature": head.envelope.SerializeToString(),
                    "created_at": head.created_at,
                },
            )
            return None

        try:
            known = self._context.database.write(work)
        except ConflictError:
            return head  # of the same tree, signed by another coordinator at the same moment
        if known is not None:
            return known
        self._witness(head)
        return head

    def _witness(self, head: SignedHead) -> None:
        """Append a head to the configured witness file; a failing witness does not stop the log."""
        path: Path | None = self._context.config.witness_file
        if path is None:
            return
        try:
            witness.append(path, head.envelope)
        except OSError as error:
            logger.warning("head was not written to the witness file: %s", error.strerror)
