"""Read-only verification of versions for the dashboard: signature, parent, contributors and audit-log entry."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.evidence.lineage import contributors_digest, open_model
from qflare.evidence.statements import StatementError, open_tree_head, require_equal
from qflare.evidence.verification import VERSION_SIGNED
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.storage.paging import Page, PageRequest
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import (
    audit_tree,
    evidence,
    global_models,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.evidence import UpdateOfVersion
from qflare_server.training.versions import find_version
from qflare_server.use_cases.audit.sequencer import entry_of, head_of, origin_of
from qflare_server.use_cases.training_sessions.administration import require_found

CACHED: Final = 4096
SHOWN_UPDATES: Final = 100


class Link(NamedTuple):
    """A version of a lineage; `problem` is the reason why its statement does not verify, empty if it does."""

    model: GlobalModel
    problem: str


@dataclass(frozen=True)
class Check:
    """One step of a proof.

    Attributes:
        name: What is checked.
        detail: The expected value, or the fault found.
        passed: None if the check is not possible yet.
    """

    name: str
    detail: str
    passed: bool | None


@dataclass(frozen=True)
class VersionProof:
    """A version with its statement, the steps of its proof, and the first hundred of its updates."""

    model: GlobalModel
    statement: security_pb2.ModelStatement
    signatures: Sequence[security_pb2.Signature]
    checks: Sequence[Check]
    updates: Sequence[UpdateOfVersion]


class Lineage:
    """Verifies versions against the keys of this coordinator; thread-safe.

    Verified signatures are cached by the bytes that they cover.
    """

    def __init__(self, context: Context, keys: ServerKeys) -> None:
        self._context = context
        self._keys = keys
        self._lock = threading.Lock()
        self._problems: OrderedDict[tuple[bytes, bytes], str] = OrderedDict()

    def links(self, training_session_id: str, request: PageRequest) -> Page[Link]:
        """Return verified versions, newest first.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
        """
        with self._context.database.read() as session:
            found = training_sessions.get_session(session, training_session_id)
            require_found(found, training_session_id)
            page = global_models.list_models(session, training_session_id, request)
            return Page([self._link(session, row) for row in page.rows], page.next_token)

    def prove(self, training_session_id: str, version: int, *, with_log: bool) -> VersionProof:
        """Return a version with the proof of its origin.

        Args:
            training_session_id: Training session.
            version: The version.
            with_log: Whether the caller may read the audit log, to which one step belongs.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            GlobalModelNotFoundError: There is no such version.
        """
        with self._context.database.read() as session:
            model = find_version(session, training_session_id, version)[1]
            checks = [self._signature(model), self._parent(session, model)]
            if model.contributors_digest:
                checks.append(_contributors(session, model))
            if with_log:
                checks.append(self._logged(session, model))
            rows = evidence.updates_of_version(
                session, training_session_id, version, 0, SHOWN_UPDATES
            )
        statement = security_pb2.ModelStatement.FromString(model.statement)
        return VersionProof(model, statement, _envelope(model).signatures, checks, rows)

    def _link(self, session: Session, model: GlobalModel) -> Link:
        checks = (self._signature(model), self._parent(session, model))
        return Link(model, next((check.detail for check in checks if not check.passed), ""))

    def _signature(self, model: GlobalModel) -> Check:
        known = (model.statement, model.signature)
        with self._lock:
            problem = self._problems.get(known)
        if problem is None:
            problem = self._signature_problem(model)
            with self._lock:
                self._problems[known] = problem
                while len(self._problems) > CACHED:
                    self._problems.popitem(last=False)
        return Check("Signature", problem or "by a model key of the keyset in force", not problem)

    def _signature_problem(self, model: GlobalModel) -> str:
        keys = self._keys.trust.signature_keys(security_pb2.KEY_ROLE_MODEL)
        try:
            opened = open_model(
                _envelope(model),
                keys,
                realm=self._context.config.realm,
                training_session_id=model.training_session_id,
            )
            require_equal("version", opened.statement.version, model.version)
            require_equal("digest", opened.digest, model.digest)
        except ValueError as error:
            return str(error)
        return ""

    def _parent(self, session: Session, model: GlobalModel) -> Check:
        """Check that the statement names the digest of the version before it."""
        named = security_pb2.ModelStatement.FromString(model.statement).parent_digest
        if model.version == 0:
            detail = "names a parent" if named else "the first version has none"
            return Check("Parent", detail, not named)
        wanted = global_models.digest_of(session, model.training_session_id, model.version - 1)
        if named == wanted:
            return Check("Parent", f"is version {model.version - 1}, {named}", passed=True)
        return Check(
            "Parent", f"parent is not the digest of version {model.version - 1}", passed=False
        )

    def _logged(self, session: Session, model: GlobalModel) -> Check:
        """Check that the signing is an entry of the tree of the newest signed head."""
        row = evidence.find_event(session, VERSION_SIGNED, f"version:{model.digest}")
        kept = audit_tree.latest_head(session)
        if row is None:
            return Check("Audit log", "no entry says that it was signed", passed=False)
        if kept is None or row.leaf_index is None or row.leaf_index >= kept.size:
            return Check("Audit log", "the next signed head will cover its entry", passed=None)
        place = row.leaf_index
        try:
            keys = self._keys.trust.signature_keys(security_pb2.KEY_ROLE_LOG)
            head = open_tree_head(
                head_of(kept).envelope, keys, origin_of(self._context.config.realm)
            )
            siblings = audit_tree.prove(
                session, lambda node: merkle.inclusion_proof(node, place, kept.size)
            )
            root = bytes.fromhex(head.root_digest)
            merkle.verify_inclusion(entry_of(row).leaf_hash(), place, head.size, siblings, root)
        except ValueError as error:
            return Check("Audit log", str(error), passed=False)
        detail = f"entry {row.id} is leaf {place:,} of {head.size:,} under the signed head {head.root_digest}"
        return Check("Audit log", detail, passed=True)


def _contributors(session: Session, model: GlobalModel) -> Check:
    """Check that the statements of the updates have the root that the version names."""
    named = security_pb2.ModelStatement.FromString(model.statement).contributors_digest
    digests = updates.contributors(session, model.training_session_id, model.version)
    try:
        passed = contributors_digest(digests) == named
    except StatementError:
        passed = False
    if passed:
        return Check(
            "Contributors",
            f"the statements of {len(digests):,} updates have the root {named}",
            passed,
        )
    return Check("Contributors", "the stored updates do not have the root that it names", passed)


def _envelope(model: GlobalModel) -> security_pb2.SignedEnvelope:
    message = security_pb2.SignedEnvelope.FromString(model.signature)
    message.payload = model.statement
    return message
