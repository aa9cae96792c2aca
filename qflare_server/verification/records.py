"""Verification of versions and updates: every column that a signed statement covers.

Columns that are not signed (states, names, results of evaluation) are not evidence and are not checked.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session

from qflare.crypto.sealed_payloads import opened_size_bytes
from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.evidence.lineage import ModelVersion, contributors_digest, open_model
from qflare.evidence.statements import (
    digest_of,
    open_update,
    require_equal,
)
from qflare.protocol.keysets import KeyRole
from qflare.tensors.manifest import Manifest
from qflare.v1 import security_pb2, tensor_pb2
from qflare_server.context import Context
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.trust_store import SignerKeys
from qflare_server.storage.payload_records import content_digest_of
from qflare_server.storage.records import DeviceKey, GlobalModel, ModelUpdate, Payload
from qflare_server.storage.repository import devices, evidence, payloads, updates
from qflare_server.storage.tables import UpdateOrigin
from qflare_server.training.rounds import origin_of
from qflare_server.verification.findings import (
    BATCH,
    Finding,
    Tally,
    differences,
    faults,
    problem_of,
    walk,
)


class RecordVerification:
    """One pass over the tables of versions and updates.

    Args:
        context: The coordinator's dependencies.
        keys: Keys of valid signers.
        identities: Proves whose a key is.
        tally: Counts of what was checked.
    """

    def __init__(
        self, context: Context, keys: SignerKeys, identities: DeviceIdentities, tally: Tally
    ) -> None:
        self._context = context
        self._keys = keys
        self._identities = identities
        self._tally = tally
        self._realm = context.config.realm

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        yield from self._models()
        yield from self._updates()

    def _models(self) -> Iterator[Finding]:
        for training_session_id in walk(self._context.database, evidence.session_ids, "", str):
            yield from self._lineage(training_session_id)

    def _lineage(self, training_session_id: str) -> Iterator[Finding]:
        """Check the versions of a training session up to its current version."""
        with self._context.database.read() as session:
            latest = evidence.latest_version(session, training_session_id)
        expected, parent = 0, ""
        while expected <= latest:
            with self._context.database.read() as session:
                rows = evidence.models_after(session, training_session_id, expected - 1, BATCH)
            for row in rows:
                if row.version > expected:
                    missing = f"{expected} to {row.version - 1}"
                    yield Finding("model", f"{training_session_id} versions {missing}", "missing")
                    parent = row.parent_digest
                yield from self._model(row, parent)
                expected, parent = row.version + 1, row.digest
            if not rows:
                yield Finding(
                    "model", f"{training_session_id} versions {expected} to {latest}", "missing"
                )
                return
        if expected > latest + 1:
            return  # the session has advanced meanwhile

    def _model(self, row: GlobalModel, parent: str) -> Iterator[Finding]:
        self._tally.checked["model"] += 1
        subject = f"{row.training_session_id} version {row.version}"
        problem = problem_of(self._check_model, row, parent)
        if problem:
            yield Finding("model", subject, problem)

    def _check_model(self, row: GlobalModel, parent: str) -> None:
        version = self._open(row)
        changed = differences(_model_columns(row, version, parent))
        if changed:
            raise ValueError(f"not what was signed: {', '.join(changed)}")
        with self._context.database.read() as session:
            digests = updates.contributors(session, row.training_session_id, row.version)
            in_process = updates.count_of_origin(
                session, row.training_session_id, row.version, UpdateOrigin.IN_PROCESS
            )
            payload = payloads.get_payload(session, row.payload_id)
            stored = None if payload is None else _kept(payload)
            sent = self._download(session, row)
        require_equal("download", sent, (row.download_payload_digest, row.download_size_bytes))
        require_equal(
            "contributors", contributors_digest(digests), version.statement.contributors_digest
        )
        require_equal("payload", stored, _stated(version.statement))
        if row.in_process_count is not None:
            require_equal("in_process_count", in_process, row.in_process_count)

    def _download(self, session: Session, row: GlobalModel) -> tuple[str | None, int | None]:
        """Return the digest and size of a version's download payload; None if it has no download encoding."""
        if row.download_payload_id is None:
            return None, None
        payload = payloads.get_payload(session, row.download_payload_id)
        return (None, None) if payload is None else (payload.digest, payload.size_bytes)

    def _open(self, row: GlobalModel) -> ModelVersion:
        envelope = security_pb2.SignedEnvelope.FromString(row.signature)
        envelope.payload = row.statement
        return open_model(
            envelope,
            self._keys[KeyRole.MODEL],
            realm=self._realm,
            training_session_id=row.training_session_id,
        )

    def _updates(self) -> Iterator[Finding]:
        rows = walk(self._context.database, evidence.updates_after, "", _update_id)
        yield from faults("update", rows, self._check_update, _update_id, self._tally)

    def _check_update(self, row: ModelUpdate) -> None:
        with self._context.database.read() as session:
            payload = payloads.get_payload(session, row.payload_id)
            stored = None if payload is None else (payload.digest, payload.size_bytes)
            kept = None if payload is None else _kept(payload)
            key = None if row.key_id is None else devices.get_key(session, row.key_id)
        require_equal("payload", stored, (row.payload_digest, row.size_bytes))
        require_equal("origin", row.origin, origin_of(row.training_session_id).value)
        if row.signature is None:
            self._check_unsigned(row)
        if row.statement is None:
            return
        require_equal("statement_digest", row.statement_digest, digest_of(row.statement))
        statement = security_pb2.UpdateStatement.FromString(row.statement)
        if row.signature is not None:
            self._check_signature(row, key)
        changed = differences(_update_columns(row, statement))
        if changed:
            raise ValueError(f"not what was signed: {', '.join(changed)}")
        require_equal("realm", statement.realm, self._realm)
        require_equal("sealed payload", kept, _stated(statement))

    def _check_unsigned(self, row: ModelUpdate) -> None:
        """Count an update without a signature where it may have none: in-process, or where none is required."""
        if row.key_id is not None:
            raise ValueError("its signature is missing")
        if row.origin == UpdateOrigin.IN_PROCESS.value:
            self._tally.unchecked["updates of embedding programs"] += 1
        elif self._context.config.require_signatures:
            raise ValueError("no device signed it")
        else:
            self._tally.unchecked["updates without a signature"] += 1

    def _check_signature(self, row: ModelUpdate, key: DeviceKey | None) -> None:
        assert row.statement is not None
        assert row.signature is not None
        if key is None or key.device_id != row.device_id:
            raise ValueError("the key that signed it is not one of its device")
        envelope = security_pb2.SignedEnvelope(payload=row.statement)
        envelope.signatures.append(security_pb2.Signature.FromString(row.signature))
        public = PublicKey(algorithm_of(key.algorithm), key.public_key)
        open_update(envelope, public)
        self._identities.require(row.device_id, public.key_id)


def _model_columns(
    row: GlobalModel, version: ModelVersion, parent: str
) -> dict[str, tuple[object, object]]:
    statement = version.statement
    layout = Manifest.from_proto(tensor_pb2.Manifest.FromString(row.manifest))
    columns = {
        "digest": (row.digest, version.digest),
        "parent": (parent, statement.parent_digest),
        "manifest": (layout.layout_digest, statement.layout_digest),
        "participant_count": (row.participant_count, statement.contributor_count),
        "aggregation_method": (row.aggregation_method, statement.strategy_name),
    }
    for name in (
        "version",
        "parent_digest",
        "payload_digest",
        "size_bytes",
        "layout_digest",
        "base_version",
        "round_number",
        "example_count",
        "contributors_digest",
    ):
        columns[name] = (getattr(row, name), getattr(statement, name))
    sent = statement.download if statement.HasField("download") else None
    for name in ("encoding", "payload_digest", "size_bytes"):
        signed = None if sent is None else getattr(sent, name)
        columns[f"download_{name}"] = (getattr(row, f"download_{name}"), signed)
    for name in ("epsilon", "delta", "rollback_version", "in_process_count"):
        columns[name] = (getattr(row, name), _optional(statement, name))
    columns["created_at"] = (row.created_at.timestamp(), _seconds(statement))
    return columns


def _update_columns(
    row: ModelUpdate, statement: security_pb2.UpdateStatement
) -> dict[str, tuple[object, object]]:
    metrics = dict(statement.metrics)
    columns: dict[str, tuple[object, object]] = {
        "id": (row.id, statement.update_id),
        "metrics": (row.metrics, metrics),
        "loss": (row.loss, metrics.get("loss")),
        "accuracy": (row.accuracy, metrics.get("accuracy")),
        "wire_digest": (row.payload_digest, statement.wire_digest or statement.payload_digest),
    }
    for name in ("training_session_id", "device_id", "base_version", "example_count"):
        columns[name] = (getattr(row, name), getattr(statement, name))
    if not statement.sealed:
        columns["size_bytes"] = (row.size_bytes, statement.size_bytes)
    if row.signature is not None:
        columns["key_id"] = (row.key_id, statement.key_id)
    return columns


def _kept(payload: Payload) -> tuple[object, ...]:
    """Return the columns of a payload's row that statements cover."""
    if payload.sealed_header is None:
        return (payload.digest, payload.size_bytes, payload.digest, "")
    header_digest = hashlib.sha256(payload.sealed_header).hexdigest()
    size_bytes = opened_size_bytes(payload.size_bytes)
    return (content_digest_of(payload), size_bytes, payload.digest, header_digest)


def _stated(
    statement: security_pb2.UpdateStatement | security_pb2.ModelStatement,
) -> tuple[object, ...]:
    """Return the payload fields of a statement: digest, size, wire digest, digest of the seal's header."""
    wire_digest = statement.wire_digest or statement.payload_digest
    return (
        statement.payload_digest,
        statement.size_bytes,
        wire_digest,
        statement.sealed_header_digest,
    )


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _seconds(statement: security_pb2.ModelStatement) -> float:
    return statement.create_time.ToMicroseconds() / 1e6


def _update_id(row: ModelUpdate) -> str:
    return row.id
