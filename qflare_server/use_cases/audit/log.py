"""The audit log: list entries, signed heads, and inclusion and consistency proofs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.evidence.audit_entries import Entry
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import AuditEntryNotFoundError, InvalidRequestError
from qflare_server.storage.paging import Page, PageRequest, fitting_count
from qflare_server.storage.records import AuditLog
from qflare_server.storage.repository import audit, audit_tree, views
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.repository.device_names import NAME_BYTES
from qflare_server.use_cases.audit.sequencer import AuditSequencer, SignedHead, entry_of, head_of


@dataclass(frozen=True)
class Consistency:
    """Proof that one tree is a prefix of another."""

    first_size: int
    second_size: int
    nodes: Sequence[bytes]


@dataclass(frozen=True)
class EntryProof:
    """Proof that an entry is in the tree.

    Attributes:
        entry: The entry.
        leaf_index: Index of its leaf.
        tree_size: Size of the tree that contains it.
        siblings: Hashes from the leaf upwards.
        head: Signed head of that size; None if none is kept.
    """

    entry: Entry
    leaf_index: int
    tree_size: int
    siblings: Sequence[bytes]
    head: SignedHead | None


class Audit:
    """Audit-log use cases."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sequencer = AuditSequencer(context)

    def list(self, request: PageRequest, wanted: AuditFilter) -> Page[AuditLog]:
        """Return entries, newest first."""
        with self._context.database.read() as session:
            return audit.list_entries(session, request, wanted)

    def count_by_risk(self, since: datetime) -> dict[str, int]:
        """Return the number of entries by risk level since a time."""
        with self._context.database.read() as session:
            return audit.count_by_risk(session, since)

    def head(
        self, known_size: int = 0, *, fresh: bool = False
    ) -> tuple[security_pb2.SignedEnvelope, Consistency | None]:
        """Return a signed head, with a consistency proof from a tree that the caller knows.

        Args:
            known_size: Size of the known tree; 0 asks for no proof.
            fresh: Require a head that covers every committed entry; otherwise it may be up to ten seconds old.

        Raises:
            InvalidRequestError: The known tree is larger than the log.
        """
        head = self._sequencer.head(fresh=fresh)
        if known_size > head.size:
            head = self._sequencer.head(fresh=True)
        if not 0 <= known_size <= head.size:
            raise InvalidRequestError(
                f"known_size: got {known_size}, want 0 to {head.size}", field="known_size"
            )
        if not known_size:
            return head.envelope, None
        with self._context.database.read() as session:
            nodes = audit_tree.prove(
                session, lambda node: merkle.consistency_proof(node, known_size, head.size)
            )
        return head.envelope, Consistency(known_size, head.size, nodes)

    def proof(
        self,
        *,
        audit_id: int | None = None,
        leaf_index: int | None = None,
        tree_size: int | None = None,
    ) -> EntryProof:
        """Return the proof that an entry is in the tree.

        Args:
            audit_id: Number of the entry; or
            leaf_index: index of its leaf.
            tree_size: Size of the tree; None takes a signed head that covers the entry.

        Raises:
            AuditEntryNotFoundError: There is no such entry, or it is not in a tree of that size.
        """
        if tree_size is None:
            return self._proof_under_head(audit_id, leaf_index)
        with self._context.database.read() as session:
            if not 0 <= tree_size <= audit_tree.size(session):
                raise InvalidRequestError(f"tree_size: got {tree_size}", field="tree_size")
            kept = audit_tree.get_head(session, tree_size)
            head = None if kept is None else head_of(kept)
            found = _prove(session, audit_id, leaf_index, tree_size, head)
        if found is None:
            raise AuditEntryNotFoundError
        return found

    def _proof_under_head(self, audit_id: int | None, leaf_index: int | None) -> EntryProof:
        """Prove an entry under the latest head, or under a fresh head if the latest does not cover it."""
        for fresh in (False, True):
            head = self._sequencer.head(fresh=fresh)
            with self._context.database.read() as session:
                found = _prove(session, audit_id, leaf_index, head.size, head)
            if found is not None:
                return found
        raise AuditEntryNotFoundError


def _prove(
    session: Session,
    audit_id: int | None,
    leaf_index: int | None,
    tree_size: int,
    head: SignedHead | None,
) -> EntryProof | None:
    """Return the inclusion proof of an entry, None if the tree does not contain it."""
    row = audit_tree.find_entry(session, audit_id=audit_id, leaf_index=leaf_index)
    if row is None or row.leaf_index is None or row.leaf_index >= tree_size:
        return None
    place = row.leaf_index
    siblings = audit_tree.prove(
        session, lambda node: merkle.inclusion_proof(node, place, tree_size)
    )
    return EntryProof(entry_of(row), place, tree_size, siblings, head)


BATCH: Final = 500


class AuditExport:
    """Exports the whole audit log."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def batches(self, wanted: AuditFilter, after_id: int) -> Iterator[Sequence[AuditLog]]:
        """Yield batches of entries; no transaction is open between two.

        Args:
            wanted: Filter of the entries.
            after_id: Only entries after this one; 0 means all.

        Raises:
            InvalidRequestError: The entry's number is negative.
        """
        if after_id < 0:
            raise InvalidRequestError(f"after_audit_id: got {after_id}", field="after_audit_id")
        batch: Sequence[AuditLog] = ()
        while True:
            with self._context.database.read() as session:
                batch = views.audit_after(session, after_id, wanted, BATCH)
            shown = batch[: max(1, fitting_count(batch, 2 * NAME_BYTES))]
            if shown:
                yield shown
                after_id = shown[-1].id
            if len(shown) == len(batch) < BATCH:
                return
