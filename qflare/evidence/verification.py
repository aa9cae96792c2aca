"""Offline verification of a model version, from the pinned root keys to its updates.

`verify_bundle` checks a `VerificationBundle` in this order and raises at the first failed check;
`VerificationError.step` names it:

``keyset``
    Root documents follow from the pinned keys, the keyset from the root, and neither is out of date.
``lineage``
    Every version from 0 to the one in question is signed by a model key and names the one before.
``log``
    The head of the audit log is signed by a log key, every entry is in its tree, and one of them
    says that this version was signed.
``device``
    Every device key was brought in by a receipt of a registrar, or by a rotation from such a key.
``contributors``
    The updates are exactly those that the version commits to, and as many of them in-process as it says.
``update``
    Every signed update is by a key of its device, for this training session and round, and from a
    version of this lineage; the log says that it was accepted.
``unmasking``
    A version with secure aggregation comes with its signed task and the signed answer of every helper of that task;
    task and answers are those that the version names, every update was masked for the task, and the answers are for
    exactly these updates.
``evaluation``
    Every evaluation is by a key of its device, of which there is one, and of this version; the log
    says that it was reported.

Missing evidence (updates of embedding programs have no signature, pruned bytes) is not an error; the
report lists it.

Not verified: that the aggregation was computed correctly (recompute the version where the updates
are kept), that the log is the same for all readers (compare heads with a witness), and the training
data of devices.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from qflare.crypto import merkle
from qflare.crypto.signing import PublicKey
from qflare.evidence.audit_entries import Entry
from qflare.evidence.device_keys import ProvenKeys
from qflare.evidence.lineage import ModelVersion, contributors_digest, verify_chain
from qflare.evidence.neighbor_transcripts import check_groups
from qflare.evidence.statements import (
    check_entry,
    digest_of,
    open_evaluation,
    open_tree_head,
    open_update,
    require_equal,
)
from qflare.evidence.unmasking import verify_transcript
from qflare.protocol.keysets import KeyRole, TrustedKeyset
from qflare.v1 import security_pb2, verification_pb2

LOG_SUFFIX: Final = "/audit"
"""What follows the realm in the origin of its audit log."""

VERSION_SIGNED: Final = "version.signed"
"""Type of the audit entry that says that a version was signed; its subject is ``version:DIGEST``."""

UPDATE_ACCEPTED: Final = "update.accepted"
"""Type of the entry that says that an update was accepted; its subject is ``update:ID``."""

EVALUATION_REPORTED: Final = "evaluation.reported"
"""Type of the entry that says that an evaluation was reported; its subject is ``evaluation:DIGEST``."""

SIGNING_ROLES: Final = tuple(role for role in KeyRole if role is not KeyRole.SESSION_KEM)
"""Roles whose keys sign."""

_T = TypeVar("_T")


class VerificationError(ValueError):
    """Verification of a bundle failed.

    Attributes:
        step: The failed check, one of the steps listed in the module docstring.
    """

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step


@dataclass(frozen=True)
class Report:
    """Result of verifying a bundle, including what could not be checked.

    Attributes:
        realm: Name of the deployment.
        training_session_id: Training session.
        version: The version.
        digest: Digest of its statement, 64 hex digits.
        payload_digest: Merkle root over its chunks, 64 hex digits; see `verify_payload`.
        size_bytes: Bytes of its payload.
        root_version: Latest root document.
        keyset_version: Keyset in force.
        lineage_length: Versions from 0 to this one.
        log_size: Entries of the audit log under the signed head.
        contributor_count: Updates in the version.
        signed_count: Those whose signature was checked.
        in_process_count: Those that a program that embeds the coordinator vouches for.
        device_count: Devices that made those.
        pruned_count: Updates whose bytes are no longer kept.
        evaluation_count: Evaluations of the version whose signature was checked.
        helper_ids: Helpers of secure aggregation whose answers were checked; empty without it. Compare them with the
            ids of helpers that you trust.
        missing: What could not be checked, in words; empty when everything was.
    """

    realm: str
    training_session_id: str
    version: int
    digest: str
    payload_digest: str
    size_bytes: int
    root_version: int
    keyset_version: int
    lineage_length: int
    log_size: int
    contributor_count: int
    signed_count: int
    in_process_count: int
    device_count: int
    pruned_count: int
    evaluation_count: int
    helper_ids: tuple[str, ...]
    missing: tuple[str, ...]


def verify_bundle(
    bundle: verification_pb2.VerificationBundle,
    root_key_ids: Collection[str],
    reference_time: datetime,
    *,
    root_threshold: int | None = None,
) -> Report:
    """Check a bundle.

    Args:
        bundle: All of its parts, merged.
        root_key_ids: Pinned ids of the keys of root document 1, 64 hex digits each.
        reference_time: The time, aware; keyset and root must not have expired by then.
        root_threshold: Minimum number of pinned keys that must have signed, as in the bootstrap bundle; None means all.

    Raises:
        VerificationError: A check failed.
    """
    return _Verification(bundle, root_key_ids, reference_time, root_threshold).run()


def verify_payload(report: Report, chunks: Iterable[bytes]) -> None:
    """Check that bytes are those of a verified version.

    Args:
        report: Of the version.
        chunks: The payload, cut every 1 MiB.

    Raises:
        VerificationError: They are not; its step is ``payload``.
    """
    tree = merkle.CompactTree()
    size_bytes = 0
    for chunk in chunks:
        tree.append(merkle.leaf_hash(chunk))
        size_bytes += len(chunk)
    if size_bytes != report.size_bytes or tree.root().hex() != report.payload_digest:
        raise VerificationError("payload", "bytes are not those of the version")


def open_evidence(evidence: verification_pb2.AuditEvidence) -> Entry:
    """Read an entry of the audit log.

    Raises:
        ValueError: A field is malformed.
    """
    return Entry(
        audit_id=evidence.audit_id,
        event_type=evidence.event_type,
        actor=evidence.actor,
        subject=evidence.subject,
        peer_address=evidence.peer_address,
        authentication_method=evidence.authentication_method,
        risk_level=evidence.risk_level,
        created_at=evidence.create_time.ToDatetime(tzinfo=UTC),
        salt=bytes.fromhex(evidence.salt),
        details=dict(evidence.details),
    )


def follow_keysets(
    trusted: TrustedKeyset,
    earlier: Iterable[security_pb2.SignedEnvelope],
    bundle: security_pb2.KeysetBundle,
    reference_time: datetime,
) -> tuple[TrustedKeyset, dict[KeyRole, tuple[PublicKey, ...]]]:
    """Verify the keysets from the first given to the one in force.

    Args:
        trusted: Starting point, with pinned roots.
        earlier: Keysets by rising version, each counted as of the time it was issued.
        bundle: All root documents, and the keyset in force.
        reference_time: The time; the keyset in force must not have expired.

    Returns:
        The trust in force, and by role every key that has ever signed in it.

    Raises:
        ValueError: A document is not to be trusted.
    """
    keys: dict[KeyRole, dict[str, PublicKey]] = {role: {} for role in SIGNING_ROLES}
    for envelope in earlier:
        keyset = security_pb2.Keyset.FromString(envelope.payload)
        at = keyset.issue_time.ToDatetime(tzinfo=UTC)
        roots = bundle.roots[: max(keyset.root_version, 0)]
        trusted = trusted.updated(security_pb2.KeysetBundle(roots=roots, keyset=envelope), at)
        _add_keys(keys, trusted, at)
    trusted = trusted.updated(bundle, reference_time)
    _add_keys(keys, trusted, reference_time)
    return trusted, {role: tuple(known.values()) for role, known in keys.items()}


def _add_keys(
    keys: dict[KeyRole, dict[str, PublicKey]], trusted: TrustedKeyset, at: datetime
) -> None:
    for role, known in keys.items():
        known.update({key.key_id: key for key in trusted.signature_keys(role, at)})


class _Verification:
    """One bundle being checked, step by step."""

    def __init__(
        self,
        bundle: verification_pb2.VerificationBundle,
        root_key_ids: Collection[str],
        reference_time: datetime,
        root_threshold: int | None,
    ) -> None:
        self._bundle = bundle
        self._pinned = sorted(set(root_key_ids))
        self._threshold = len(self._pinned) if root_threshold is None else root_threshold
        self._at = reference_time
        self._devices: set[str] = set()

    def run(self) -> Report:
        trusted, ever = _step("keyset", self._follow)
        model_keys = trusted.signature_keys(KeyRole.MODEL, self._at)
        chain = _step("lineage", lambda: self._chain(model_keys))
        log_keys = trusted.signature_keys(KeyRole.LOG, self._at)
        head = _step("log", lambda: self._head(log_keys))
        entries = _step("log", lambda: self._entries(head))
        _step("log", lambda: _check_signed(chain[-1], entries))
        keys = _step("device", lambda: self._device_keys(ever[KeyRole.REGISTRAR]))
        _step("contributors", lambda: self._check_contributors(chain[-1].statement))
        signed = [update for update in self._bundle.updates if update.HasField("statement")]
        for update in signed:
            _step("update", partial(self._check_update, update, chain, keys, entries))
        helpers = _step(
            "unmasking", lambda: self._check_unmasking(chain[-1], ever[KeyRole.TASK], keys)
        )
        _step("evaluation", lambda: self._check_evaluations(chain[-1], keys, entries))
        return self._report(trusted, chain, head, len(signed), helpers)

    def _follow(self) -> tuple[TrustedKeyset, dict[KeyRole, tuple[PublicKey, ...]]]:
        pinned = security_pb2.BootstrapBundle(
            realm=self._bundle.realm, root_key_ids=self._pinned, threshold=self._threshold
        )
        return follow_keysets(
            TrustedKeyset.bootstrap(pinned),
            self._bundle.earlier_keysets,
            self._bundle.keyset,
            self._at,
        )

    def _chain(self, model_keys: tuple[PublicKey, ...]) -> list[ModelVersion]:
        chain = verify_chain(
            self._bundle.statements,
            model_keys,
            realm=self._bundle.realm,
            training_session_id=self._bundle.training_session_id,
        )
        if not chain or chain[0].statement.version != 0:
            raise ValueError("lineage does not begin at version 0")
        require_equal("version", chain[-1].statement.version, self._bundle.version)
        return chain

    def _head(self, log_keys: tuple[PublicKey, ...]) -> security_pb2.TreeHead:
        return open_tree_head(self._bundle.head, log_keys, self._bundle.realm + LOG_SUFFIX)

    def _entries(self, head: security_pb2.TreeHead) -> dict[tuple[str, str], Entry]:
        """Return the entries by type and subject, each shown to be in the log."""
        entries = {}
        for evidence in self._bundle.entries:
            entry = open_evidence(evidence)
            check_entry(head, entry.leaf_hash(), evidence.proof)
            entries[entry.event_type, entry.subject] = entry
        return entries

    def _device_keys(self, registrars: tuple[PublicKey, ...]) -> ProvenKeys:
        keys = ProvenKeys(self._bundle.realm, registrars)
        for evidence in self._bundle.device_keys:
            keys.add(evidence)
        return keys

    def _check_contributors(self, statement: security_pb2.ModelStatement) -> None:
        digests = [update.statement_digest for update in self._bundle.updates]
        require_equal("contributor_count", len(digests), statement.contributor_count)
        require_equal(
            "contributors_digest", contributors_digest(digests), statement.contributors_digest
        )
        in_process = [update for update in self._bundle.updates if update.in_process]
        if statement.HasField("in_process_count"):
            require_equal("in_process_count", len(in_process), statement.in_process_count)
        if any(update.HasField("statement") for update in in_process):
            raise ValueError("an update that a device signed is marked as in-process")

    def _check_update(
        self,
        update: verification_pb2.UpdateEvidence,
        chain: list[ModelVersion],
        keys: ProvenKeys,
        entries: Mapping[tuple[str, str], Entry],
    ) -> None:
        made = chain[-1].statement
        stated = security_pb2.UpdateStatement.FromString(update.statement.payload)
        statement = open_update(update.statement, keys.get(stated.device_id, stated.key_id))
        digest = digest_of(update.statement.payload)
        require_equal("statement_digest", update.statement_digest, digest)
        require_equal("realm", statement.realm, made.realm)
        require_equal(
            "training_session_id", statement.training_session_id, made.training_session_id
        )
        if statement.round_number > made.round_number:
            raise ValueError("update is for a later round than the version's")
        if statement.base_version > made.base_version:
            raise ValueError("update was trained from a later version than its round")
        base = chain[statement.base_version]
        require_equal("base_digest", statement.base_digest, base.digest)
        entry = entries.get((UPDATE_ACCEPTED, f"update:{statement.update_id}"))
        if entry is None or entry.details.get("statement_digest") != digest:
            raise ValueError(f"the log does not say that update {statement.update_id} was accepted")
        self._devices.add(statement.device_id)

    def _check_unmasking(
        self, made: ModelVersion, task_keys: tuple[PublicKey, ...], keys: ProvenKeys
    ) -> tuple[str, ...]:
        """Check the transcript of secure aggregation; return the ids of the helpers, empty without it."""
        statement = made.statement
        stated = [
            security_pb2.UpdateStatement.FromString(update.statement.payload)
            for update in self._bundle.updates
            if update.HasField("statement")
        ]
        if not statement.HasField("unmasking"):
            if self._bundle.HasField("unmasking") or any(
                item.HasField("masking") for item in stated
            ):
                raise ValueError(
                    "updates are masked, but the version does not name how the sum was unmasked"
                )
            return ()
        if len(stated) != statement.contributor_count:
            raise ValueError("a masked update has no signed statement")
        digests = [update.statement_digest for update in self._bundle.updates]
        transcript = self._bundle.unmasking
        masking = verify_transcript(transcript, statement, task_keys, stated, digests)
        if masking.neighbors is not None:
            check_groups(transcript.groups, statement, masking, stated, digests, keys.get)
        return tuple(helper.helper_id for helper in masking.helpers)

    def _check_evaluations(
        self, made: ModelVersion, keys: ProvenKeys, entries: Mapping[tuple[str, str], Entry]
    ) -> None:
        evaluators: set[str] = set()
        for envelope in self._bundle.evaluations:
            stated = security_pb2.EvaluationStatement.FromString(envelope.payload)
            statement = open_evaluation(envelope, keys.get(stated.device_id, stated.key_id))
            for field in ("realm", "training_session_id", "version"):
                require_equal(field, getattr(statement, field), getattr(made.statement, field))
            require_equal("version_digest", statement.version_digest, made.digest)
            if statement.device_id in evaluators:
                raise ValueError(f"device {statement.device_id[:64]} evaluated the version twice")
            evaluators.add(statement.device_id)
            digest = digest_of(envelope.payload)
            if (EVALUATION_REPORTED, f"evaluation:{digest}") not in entries:
                raise ValueError(f"the log does not say that evaluation {digest} was reported")

    def _report(
        self,
        trusted: TrustedKeyset,
        chain: list[ModelVersion],
        head: security_pb2.TreeHead,
        signed_count: int,
        helpers: tuple[str, ...],
    ) -> Report:
        made = chain[-1]
        contributor_count = len(self._bundle.updates)
        pruned_count = sum(update.pruned for update in self._bundle.updates)
        missing = []
        in_process_count = sum(update.in_process for update in self._bundle.updates)
        if in_process_count:
            missing.append(f"{in_process_count} updates are in-process: no device signed them")
        unsigned_count = contributor_count - signed_count - in_process_count
        if unsigned_count:
            missing.append(f"{unsigned_count} updates carry no signature of a device")
        if pruned_count:
            missing.append(f"the bytes of {pruned_count} updates are pruned: no recomputation")
        return Report(
            realm=self._bundle.realm,
            training_session_id=self._bundle.training_session_id,
            version=made.statement.version,
            digest=made.digest,
            payload_digest=made.statement.payload_digest,
            size_bytes=made.statement.size_bytes,
            root_version=trusted.root_version,
            keyset_version=trusted.keyset_version,
            lineage_length=len(chain),
            log_size=head.size,
            contributor_count=contributor_count,
            signed_count=signed_count,
            in_process_count=in_process_count,
            device_count=len(self._devices),
            pruned_count=pruned_count,
            evaluation_count=len(self._bundle.evaluations),
            helper_ids=helpers,
            missing=tuple(missing),
        )


def _check_signed(made: ModelVersion, entries: Mapping[tuple[str, str], Entry]) -> None:
    entry = entries.get((VERSION_SIGNED, f"version:{made.digest}"))
    if entry is None or entry.details.get("version") != str(made.statement.version):
        raise ValueError("the log does not say that this version was signed")


def _step(name: str, check: Callable[[], _T]) -> _T:
    """Run a check; convert any failure to a `VerificationError`."""
    try:
        return check()
    except (ValueError, DecodeError) as error:
        raise VerificationError(name, str(error)) from error
