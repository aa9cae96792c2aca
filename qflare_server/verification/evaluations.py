"""Verification of evaluations: every column that a signed statement covers.

Rows without a statement predate signed evaluations; they have no effect and are only counted.
"""

from collections.abc import Iterator, Sequence

from sqlalchemy.orm import Session

from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.evidence.statements import digest_of, open_evaluation, require_equal
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.storage.records import Evaluation
from qflare_server.storage.repository import devices, evidence, global_models
from qflare_server.verification.findings import Finding, Tally, differences, faults, walk


class EvaluationVerification:
    """One pass over the evaluations.

    Args:
        context: The coordinator's dependencies.
        identities: Proves whose a key is.
        tally: Counts of what was checked.
    """

    def __init__(self, context: Context, identities: DeviceIdentities, tally: Tally) -> None:
        self._context = context
        self._identities = identities
        self._tally = tally

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        rows = walk(self._context.database, _read, ("", -1, ""), _key_of)
        yield from faults("evaluation", rows, self._check, _name_of, self._tally)

    def _check(self, row: Evaluation) -> None:
        if row.statement is None:
            self._tally.unchecked["evaluations from before they were signed"] += 1
            return
        with self._context.database.read() as session:
            key = devices.get_key(session, row.key_id or "")
            model = global_models.get_model(session, row.training_session_id, row.version)
        if key is None or key.device_id != row.device_id:
            raise ValueError("the key that signed it is not one of its device")
        envelope = security_pb2.SignedEnvelope(payload=row.statement)
        envelope.signatures.append(security_pb2.Signature.FromString(row.signature or b""))
        public = PublicKey(algorithm_of(key.algorithm), key.public_key)
        statement = open_evaluation(envelope, public)
        self._identities.require(row.device_id, public.key_id)
        require_equal("statement_digest", row.statement_digest, digest_of(row.statement))
        require_equal("realm", statement.realm, self._context.config.realm)
        version_digest = None if model is None else model.digest
        require_equal("version_digest", statement.version_digest, version_digest)
        changed = differences(_columns(row, statement))
        if changed:
            raise ValueError(f"not what was signed: {', '.join(changed)}")


def _columns(
    row: Evaluation, statement: security_pb2.EvaluationStatement
) -> dict[str, tuple[object, object]]:
    columns: dict[str, tuple[object, object]] = {
        name: (getattr(row, name), getattr(statement, name))
        for name in ("training_session_id", "version", "device_id", "key_id", "example_count")
    }
    columns["metrics"] = (row.metrics, dict(statement.metrics))
    columns["weight"] = (row.weight is not None and 0 < row.weight <= row.example_count, True)
    return columns


def _read(session: Session, after: tuple[str, int, str], limit: int) -> Sequence[Evaluation]:
    return evidence.evaluations_after(session, after, limit)


def _key_of(row: Evaluation) -> tuple[str, int, str]:
    return row.training_session_id, row.version, row.device_id


def _name_of(row: Evaluation) -> str:
    return f"of {row.training_session_id} version {row.version} by {row.device_id}"
