"""Verification of the audit log: every entry, node and signed head of its tree, and the heads kept by a witness.

One pass over the entries in order rebuilds the tree. A modified entry differs from its stored leaf; the pass continues
with the stored leaf, so that one modified row is one finding and not one for each row after it. If leaves and nodes
were modified consistently, the signed heads no longer match.

The log may grow meanwhile: the pass checks what exists when it begins.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from qflare.crypto import merkle
from qflare.evidence.audit_entries import InvalidEntryError
from qflare.evidence.statements import StatementError, digest_of, open_tree_head
from qflare.evidence.verification import EVALUATION_REPORTED, UPDATE_ACCEPTED, VERSION_SIGNED
from qflare.protocol.keysets import KeyRole
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.keys.trust_store import SignerKeys
from qflare_server.storage.records import AuditHead, AuditLog
from qflare_server.storage.repository import audit_tree, evidence, trust_documents
from qflare_server.storage.repository.audit_tree import Place
from qflare_server.storage.repository.evidence import LoggedUpdate
from qflare_server.use_cases.audit import witness
from qflare_server.use_cases.audit.sequencer import entry_of, head_of, origin_of
from qflare_server.verification.findings import BATCH, Finding, Tally

DOCUMENT_PUBLISHED: Final = frozenset({"root.published", "keyset.published"})
IN_PROCESS: Final = (
    "in-process"  # authentication method of embedding programs, whose updates carry no statement
)
MAX_GAP: Final = 10_000  # consecutive missing entries after which the pass ends


class AuditVerification:
    """One pass over the audit log.

    Args:
        context: The coordinator's dependencies.
        keys: Keys of valid signers.
        tally: Counts of the checked records.
        witness_file: Tree heads kept by a witness; None if there is none.
    """

    def __init__(
        self, context: Context, keys: SignerKeys, tally: Tally, witness_file: Path | None
    ) -> None:
        self._context = context
        self._keys = keys
        self._tally = tally
        self._witness_file = witness_file
        self._tree = merkle.CompactTree()
        self._roots: dict[int, set[bytes]] = {}
        self._nodes: dict[Place, bytes] = {}
        self._intact: list[AuditLog] = []

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        with self._context.database.read() as session:
            latest = audit_tree.latest_head(session)
            last_head = -1 if latest is None else latest.size
            leaf_count = audit_tree.size(session)
        yield from self._heads(last_head, leaf_count)
        yield from self._witnessed(leaf_count)
        yield from self._entries(leaf_count)
        yield from self._unknown_nodes(leaf_count)
        yield from self._waiting()

    def _heads(self, last: int, leaf_count: int) -> Iterator[Finding]:
        """Check each signed head, and keep its root until the rebuilt tree reaches its size."""
        size = -1
        while size < last:
            with self._context.database.read() as session:
                rows = audit_tree.heads_after(session, size, BATCH)
            if not rows:
                return
            for row in rows:
                size = row.size
                if size <= last:
                    yield from self._head(row, leaf_count)

    def _head(self, row: AuditHead, leaf_count: int) -> Iterator[Finding]:
        self._tally.checked["head"] += 1
        subject = f"of size {row.size}"
        try:
            head = self._open(head_of(row).envelope)
        except (StatementError, DecodeError) as error:
            yield Finding("head", subject, str(error))
            return
        if (head.size, head.root_digest) != (row.size, row.root.hex()):
            yield Finding("head", subject, "the row is not what was signed")
        yield from self._expect("head", head, leaf_count)

    def _open(self, envelope: security_pb2.SignedEnvelope) -> security_pb2.TreeHead:
        origin = origin_of(self._context.config.realm)
        return open_tree_head(envelope, self._keys[KeyRole.LOG], origin)

    def _expect(self, kind: str, head: security_pb2.TreeHead, leaf_count: int) -> Iterator[Finding]:
        if head.size > leaf_count:
            problem = f"the log has {leaf_count} entries only: some were deleted"
            yield Finding(kind, f"of size {head.size}", problem)
        elif head.size == 0 and head.root_digest != merkle.EMPTY_ROOT.hex():
            yield Finding(kind, "of size 0", "its root is not that of an empty log")
        elif head.size:
            self._roots.setdefault(head.size, set()).add(bytes.fromhex(head.root_digest))

    def _witnessed(self, leaf_count: int) -> Iterator[Finding]:
        if self._witness_file is None:
            return
        try:
            for envelope in witness.read(self._witness_file):
                self._tally.checked["witness"] += 1
                yield from self._expect("witness", self._open(envelope), leaf_count)
        except (OSError, StatementError) as error:
            yield Finding("witness", str(self._witness_file), str(error))

    def _entries(self, leaf_count: int) -> Iterator[Finding]:
        """Check the entries and the nodes that they complete."""
        while self._tree.size < leaf_count:
            first = self._tree.size
            end = min(first + BATCH, leaf_count)
            with self._context.database.read() as session:
                found = audit_tree.entries_after(session, first - 1, end - first)
                self._nodes = audit_tree.nodes_in(session, _ranges(first, end))
            by_place = {row.leaf_index: row for row in found}
            missing = by_place.keys().isdisjoint(range(first, end))
            if missing and self._next_place(first) - first > MAX_GAP:
                yield Finding("audit", f"places {first} to {leaf_count - 1}", "entries are missing")
                return
            self._intact = []
            for place in range(first, end):
                yield from self._entry(place, by_place.get(place))
            yield from self._events(self._intact)

    def _next_place(self, place: int) -> int:
        with self._context.database.read() as session:
            rows = audit_tree.entries_after(session, place - 1, 1)
        return place if not rows or rows[0].leaf_index is None else rows[0].leaf_index

    def _entry(self, place: int, row: AuditLog | None) -> Iterator[Finding]:
        self._tally.checked["audit"] += 1
        stored = self._nodes.get((0, place))
        leaf = None
        if row is None:
            yield Finding("audit", f"at place {place}", "the entry is missing: it was deleted")
        else:
            leaf, problem = _leaf(row, stored)
            if problem:
                yield Finding("audit", f"entry {row.id} at place {place}", problem)
            else:
                self._intact.append(row)
        yield from self._grow(leaf if stored is None else stored)

    def _grow(self, leaf: bytes | None) -> Iterator[Finding]:
        for level, place, computed in self._tree.append(leaf or bytes(merkle.HASH_BYTES)):
            if self._nodes.get((level, place)) != computed:
                yield Finding(
                    "audit", f"node {place} of level {level}", "it was changed or deleted"
                )
        size = self._tree.size
        for root in self._roots.pop(size, ()):
            if root != self._tree.root():
                problem = "entries up to there are not those that were signed"
                yield Finding("head", f"of size {size}", problem)

    def _events(self, rows: Sequence[AuditLog]) -> Iterator[Finding]:
        """Check that the records named by log entries still exist."""
        accepted = _about(rows, UPDATE_ACCEPTED, "update:")
        signed = _about(rows, VERSION_SIGNED, "version:")
        reported = _about(rows, EVALUATION_REPORTED, "evaluation:")
        with self._context.database.read() as session:
            updates = evidence.accepted_updates(session, accepted)
            known = evidence.known_digests(session, signed)
            evaluations = evidence.known_evaluations(session, reported)
        for update_id, row in accepted.items():
            problem = _compare_update(row, updates.get(update_id))
            if problem:
                yield Finding("update", update_id, f"{problem} (audit entry {row.id})")
        yield from self._documents(rows)
        for digest in signed.keys() - known:
            problem = f"signed by audit entry {signed[digest].id}, and missing"
            yield Finding("model", f"with digest {digest}", problem)
        for digest in reported.keys() - evaluations:
            problem = f"reported by audit entry {reported[digest].id}, and missing"
            yield Finding("evaluation", f"with digest {digest}", problem)

    def _documents(self, rows: Sequence[AuditLog]) -> Iterator[Finding]:
        """Check that published root documents and keysets exist: without the newest, trust would be rolled back."""
        for row in rows:
            if row.event_type not in DOCUMENT_PUBLISHED:
                continue
            kind, _, version = row.subject.partition(":")
            with self._context.database.read() as session:
                data = trust_documents.find(
                    session, kind, int(version) if version.isdecimal() else 0
                )
            if data is None or _document_digest(data) != row.details.get("digest"):
                problem = f"not the one that audit entry {row.id} published, or missing"
                yield Finding("keyset", row.subject, problem)

    def _unknown_nodes(self, leaf_count: int) -> Iterator[Finding]:
        """Find nodes beyond the end of the log, which may have grown since the pass began."""
        levels = range(64)
        with self._context.database.read() as session:
            ranges = [(level, leaf_count >> level, 2**62) for level in levels]
            beyond = audit_tree.nodes_in(session, ranges, BATCH)
        with self._context.database.read() as session:
            size = audit_tree.size(session)
        for level, place in sorted(beyond):
            if place >= size >> level:
                yield Finding("audit", f"node {place} of level {level}", "it is beyond the log")

    def _waiting(self) -> Iterator[Finding]:
        """Check entries that have no leaf index yet."""
        with self._context.database.read() as session:
            rows = audit_tree.pending(session, BATCH)
        for row in rows:
            self._tally.unchecked["audit entries that have no place yet"] += 1
            _, problem = _leaf(row, None)
            if row.leaf_hash is not None:
                problem = "it has lost its place"
            if problem:
                yield Finding("audit", f"entry {row.id}", problem)


def _about(rows: Sequence[AuditLog], event_type: str, prefix: str) -> dict[str, AuditLog]:
    """Return the entries of a type, by subject without its prefix; other subjects are omitted."""
    return {
        row.subject.removeprefix(prefix): row
        for row in rows
        if row.event_type == event_type and row.subject.startswith(prefix)
    }


def _document_digest(data: bytes) -> str | None:
    try:
        return digest_of(security_pb2.SignedEnvelope.FromString(data).payload)
    except DecodeError:
        return None


def _compare_update(entry: AuditLog, row: LoggedUpdate | None) -> str:
    """Return the problem of an accepted update's row; empty if there is none."""
    if row is None:
        return "it was accepted, and is missing"
    columns = {
        "training_session_id": row.training_session_id,
        "round": row.round_number,
        "sequence": row.acceptance_sequence,
        "statement_digest": row.statement_digest,
    }
    changed = [name for name, got in columns.items() if entry.details.get(name, got) != got]
    if changed:
        return f"not as it was accepted: {', '.join(changed)}"
    if not row.has_statement and entry.authentication_method != IN_PROCESS:
        return "its statement is missing"
    return ""


def _leaf(row: AuditLog, stored: bytes | None) -> tuple[bytes | None, str]:
    """Return the leaf hash of a row, and the row's problem."""
    try:
        leaf = entry_of(row).leaf_hash()
    except (InvalidEntryError, AttributeError, TypeError) as error:
        return None, f"it was changed: {error}"
    if row.leaf_index is not None and row.leaf_hash != leaf:
        return leaf, "it was changed since it got its place"
    if stored is not None and stored != leaf:
        return leaf, "it is not the entry that the tree holds: it was changed or replaced"
    return leaf, ""


def _ranges(first: int, end: int) -> list[tuple[int, int, int]]:
    """Return the nodes completed by the leaves [first, end), as ranges of each level."""
    levels = range(end.bit_length())
    return [
        (level, first >> level, end >> level) for level in levels if first >> level < end >> level
    ]
