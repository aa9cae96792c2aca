"""Checks a verification bundle, written from docs/protocol.md section 13 alone.

Under the rule of `tests.independent.verifier`: nothing of the product but its generated messages.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from qflare.v1 import security_pb2 as pb
from qflare.v1 import verification_pb2
from tests.independent.exchange import audit_leaf
from tests.independent.neighbors import Devices
from tests.independent.unmasking import MASKED, check_transcript
from tests.independent.verifier import (
    LOG,
    MODEL,
    REGISTRAR,
    TASK,
    Keys,
    check_inclusion,
    key_id,
    leaf,
    merkle_root,
    open_chain,
    open_envelope,
    open_evaluation,
    open_keyset,
    open_update,
    require,
)

RISKS = ("low", "medium", "high", "critical")
Entries = Mapping[tuple[str, str], verification_pb2.AuditEvidence]
Chain = Sequence[tuple[pb.ModelStatement, str]]


def check_bundle(
    bundle: verification_pb2.VerificationBundle,
    pinned: Sequence[str],
    threshold: int,
    at: datetime,
) -> Chain:
    """Check a bundle; return its versions."""
    realm, session_id = bundle.realm, bundle.training_session_id
    ever = _earlier_keys(bundle, pinned, threshold)
    roles = open_keyset(bundle.keyset, realm, pinned, threshold, at)
    registrars, task_keys = ({**ever[role], **roles[role]} for role in (REGISTRAR, TASK))
    chain = open_chain(bundle.statements, roles[MODEL], realm, session_id)
    require(chain[0][0].version == 0, "lineage does not begin at version 0")
    require(chain[-1][0].version == bundle.version, "lineage ends at another version")
    entries = _open_entries(bundle, roles[LOG])
    signed = entries.get(("version.signed", f"version:{chain[-1][1]}"))
    require(signed and signed.details["version"] == str(bundle.version), "not in the log")
    keys = open_device_keys(bundle.device_keys, registrars, realm)
    digests = sorted(bytes.fromhex(update.statement_digest) for update in bundle.updates)
    root = merkle_root([leaf(digest) for digest in digests]).hex() if digests else ""
    require(root == chain[-1][0].contributors_digest, "other updates are in the version")
    made = chain[-1][0]
    unsigned = [update for update in bundle.updates if update.in_process]
    if made.HasField("in_process_count"):
        require(len(unsigned) == made.in_process_count, "other updates are in-process")
        require(made.in_process_count in (0, made.contributor_count), "origins are mixed")
    require(not any(update.HasField("statement") for update in unsigned), "it is signed")
    for update in bundle.updates:
        if update.HasField("statement"):
            _check_update(update, chain, keys, entries)
    _check_masks(bundle, made, task_keys, keys)
    _check_evaluations(bundle, chain[-1], keys, entries)
    return chain


def _check_masks(
    bundle: verification_pb2.VerificationBundle,
    made: pb.ModelStatement,
    task_keys: Keys,
    devices: Devices,
) -> None:
    payloads = {
        update.statement_digest: update.statement.payload
        for update in bundle.updates
        if update.HasField("statement")
    }
    if made.HasField("unmasking"):
        check_transcript(bundle.unmasking, made, task_keys, payloads, devices)
        return
    require(not bundle.HasField("unmasking"), "transcript of a version without masks")
    for payload in payloads.values():
        encoding = pb.UpdateStatement.FromString(payload).encoding
        require(encoding != MASKED, "masked update in a version without a transcript")


def _earlier_keys(
    bundle: verification_pb2.VerificationBundle, pinned: Sequence[str], threshold: int
) -> dict[int, dict[str, pb.PublicKey]]:
    found: dict[int, dict[str, pb.PublicKey]] = {REGISTRAR: {}, TASK: {}}
    version = 0
    for envelope in bundle.earlier_keysets:
        keyset = pb.Keyset.FromString(envelope.payload)
        require(keyset.version > version, "keysets are out of order")
        version = keyset.version
        roots = bundle.keyset.roots[: keyset.root_version]
        issued = keyset.issue_time.ToDatetime(tzinfo=UTC)
        documents = pb.KeysetBundle(roots=roots, keyset=envelope)
        roles = open_keyset(documents, bundle.realm, pinned, threshold, issued)
        for role, keys in found.items():
            keys.update(roles[role])
    return found


def _open_entries(bundle: verification_pb2.VerificationBundle, keys: Keys) -> Entries:
    head = pb.TreeHead.FromString(open_envelope(bundle.head, "qflare/v1/sth", keys))
    require(head.origin == f"{bundle.realm}/audit", "head of another log")
    entries = {}
    for entry in bundle.entries:
        require(entry.proof.tree_size == head.size, "proof under another head")
        start = audit_leaf(_fields(entry), bytes.fromhex(entry.salt))
        check_inclusion(start, entry.proof, bytes.fromhex(head.root_digest))
        entries[entry.event_type, entry.subject] = entry
    return entries


def _fields(entry: verification_pb2.AuditEvidence) -> dict[str, object]:
    return {
        "audit_id": entry.audit_id,
        "microseconds": entry.create_time.ToMicroseconds(),
        "risk": RISKS.index(entry.risk_level) + 1,
        "event_type": entry.event_type,
        "authentication_method": entry.authentication_method,
        "actor": entry.actor,
        "subject": entry.subject,
        "peer_address": entry.peer_address,
        "details": dict(entry.details),
    }


def open_device_keys(
    evidence: Iterable[verification_pb2.DeviceKeyEvidence], registrars: Keys, realm: str
) -> dict[str, tuple[str, pb.PublicKey]]:
    """Return keys with their devices by key id."""
    known: dict[str, tuple[str, pb.PublicKey]] = {}
    counts: dict[str, int] = {}
    for item in evidence:
        key = item.key
        require(key.key_id == key_id(key.algorithm, key.data), "key id of another key")
        if item.WhichOneof("origin") == "receipt":
            payload = open_envelope(item.receipt, "qflare/v1/receipt", registrars)
            receipt = pb.EnrollmentReceipt.FromString(payload)
            named = (receipt.realm, receipt.device_id, receipt.signature_key_id)
            count = receipt.key_rotation_count
        else:
            stated = pb.KeyRotation.FromString(item.rotation.payload)
            owner, previous = known.get(stated.previous_key_id, ("", pb.PublicKey()))
            require(owner == item.device_id, "rotation from a key of another device")
            both = {previous.key_id: previous, key.key_id: key}
            open_envelope(item.rotation, "qflare/v1/rotate", both, 2)
            named = (stated.realm, stated.device_id, stated.signature_key.key_id)
            count = stated.sequence_number
            require(count == counts[previous.key_id] + 1, "rotation is not the next one")
        require(named == (realm, item.device_id, key.key_id), "evidence of another key")
        numbered = {
            counts[other]: other for other, (owner, _) in known.items() if owner == item.device_id
        }
        require(numbered.get(count, key.key_id) == key.key_id, "history of keys is forked")
        known[key.key_id] = (item.device_id, key)
        counts[key.key_id] = count
    return known


def _check_update(
    update: verification_pb2.UpdateEvidence,
    chain: Chain,
    keys: Mapping[str, tuple[str, pb.PublicKey]],
    entries: Entries,
) -> None:
    made = chain[-1][0]
    stated = pb.UpdateStatement.FromString(update.statement.payload)
    owner, key = keys.get(stated.key_id, ("", pb.PublicKey()))
    require(owner and owner == stated.device_id, "nothing shows whose key signed the update")
    statement = open_update(update.statement, key)
    digest = hashlib.sha256(update.statement.payload).hexdigest()
    require(update.statement_digest == digest, "update has another digest")
    place = (statement.realm, statement.training_session_id)
    require(place == (made.realm, made.training_session_id), "update is of another session")
    require(statement.round_number <= made.round_number, "update is of a later round")
    require(statement.base_version <= made.base_version, "update is from a later version")
    require(statement.base_digest == chain[statement.base_version][1], "update has another base")
    entry = entries.get(("update.accepted", f"update:{statement.update_id}"))
    require(entry and entry.details["statement_digest"] == digest, "update is not in the log")


def _check_evaluations(
    bundle: verification_pb2.VerificationBundle,
    version: tuple[pb.ModelStatement, str],
    keys: Mapping[str, tuple[str, pb.PublicKey]],
    entries: Entries,
) -> None:
    made, version_digest = version
    wanted = (made.realm, made.training_session_id, made.version, version_digest)
    evaluators = []
    for envelope in bundle.evaluations:
        stated = pb.EvaluationStatement.FromString(envelope.payload)
        owner, key = keys.get(stated.key_id, ("", pb.PublicKey()))
        require(owner and owner == stated.device_id, "nothing shows whose key signed an evaluation")
        statement = open_evaluation(envelope, key)
        place = (statement.realm, statement.training_session_id, statement.version)
        require((*place, statement.version_digest) == wanted, "evaluation is of another version")
        evaluators.append(statement.device_id)
        digest = hashlib.sha256(envelope.payload).hexdigest()
        entry = entries.get(("evaluation.reported", f"evaluation:{digest}"))
        require(entry is not None, "evaluation is not in the log")
    require(len(set(evaluators)) == len(evaluators), "a device evaluated the version twice")
