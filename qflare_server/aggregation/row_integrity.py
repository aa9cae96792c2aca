"""Detects stored updates that the coordinator did not write, before they are folded.

Between acceptance and folding an update is rows in a database. `RowIntegrity` makes sure that they still are what a
device signed: the signature verifies under a key that is shown to be the device's (`keys.device_identities`) and that
was in use when the round was opened or later, and every column that is folded says what the statement says. An update
that fails is never folded; it counts as rejected, its reason begins with `EVIDENCE_REASON`, and it stands in the record
of the version's outcome, so that the version is made again from the same updates. It is not held against the device.

It is checked where signatures are required (`ServerConfig.require_signatures`), but for the rounds of embedding
programs, which vouch for their updates themselves. In all rounds the updates are of one origin, devices' or in-process:
a row of the other is not folded.

It checks the digests of payloads, and the bytes of those that lie in rows. The bytes of others are compared with these
digests when they are read from the payload store (`fold`).
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.evidence.statements import StatementError, require_equal
from qflare.tensors import payload_digest
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.storage.payload_records import split_digests
from qflare_server.storage.repository import audit, devices, training_sessions, updates
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.repository.devices import KnownKey
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.storage.tables import EVIDENCE_REASON, RiskLevel
from qflare_server.strategies import UpdateAssessment
from qflare_server.training.rounds import is_in_process, origin_of

logger = logging.getLogger(__name__)

CLOCK_SLACK: Final = timedelta(minutes=5)
"""How far the clocks of two replicas may be apart: of the one that opened a round and the one that retired a key."""

Statement = security_pb2.UpdateStatement


class RowIntegrity:
    """Checks the updates of one round; used by one thread.

    Args:
        context: The coordinator's parts.
        training_session_id: Training session.
        round_number: The round that the updates are folded in.
        carries: Whether it takes updates of earlier rounds' tasks.
        recorded: Judgements of an earlier run by update id. What was refused then is refused again, and updates
            without a signature pass as they did then.
    """

    def __init__(
        self,
        context: Context,
        training_session_id: str,
        round_number: int,
        *,
        carries: bool,
        recorded: Mapping[str, UpdateAssessment] | None = None,
    ) -> None:
        self._context = context
        self._session_id = training_session_id
        self._number = round_number
        self._carries = carries
        self._recorded = recorded
        self._origin = origin_of(training_session_id).value
        self._is_on = context.config.require_signatures and not is_in_process(training_session_id)
        self._opened: dict[int, datetime] = {}

    def refusals(self, batch: Sequence[AcceptedUpdate]) -> dict[str, str]:
        """Return the reasons for rejecting updates, by id; empty if all match their signed statements."""
        found = self._recorded_refusals(batch)
        for update in batch:
            if update.origin != self._origin and update.update_id not in found:
                self._refuse(found, update, f"its origin is {update.origin}, want {self._origin}")
        if not self._is_on:
            return found
        keys = self._keys(batch)
        unproven = self._context.identities.problems(
            (update.device_id, update.key_id) for update in batch if update.key_id is not None
        )
        for update in batch:
            problem = self._problem(update, keys)
            if not problem and update.key_id is not None:
                problem = unproven.get((update.device_id, update.key_id), "")
            if problem and update.update_id not in found:
                self._refuse(found, update, problem)
        return found

    def _refuse(self, found: dict[str, str], update: AcceptedUpdate, problem: str) -> None:
        found[update.update_id] = EVIDENCE_REASON + problem
        logger.warning("update not folded: %s: %s", update.update_id, problem)

    def _recorded_refusals(self, batch: Sequence[AcceptedUpdate]) -> dict[str, str]:
        recorded = self._recorded or {}
        reasons = {
            update.update_id: recorded[update.update_id].rejection
            for update in batch
            if update.update_id in recorded
        }
        return {name: text for name, text in reasons.items() if text.startswith(EVIDENCE_REASON)}

    def _keys(self, batch: Sequence[AcceptedUpdate]) -> Mapping[str, KnownKey]:
        """Read the keys that a batch names."""
        key_ids = {update.key_id for update in batch if update.key_id is not None}
        with self._context.database.read() as session:
            return devices.get_keys(session, key_ids)

    def _problem(self, update: AcceptedUpdate, keys: Mapping[str, KnownKey]) -> str:
        """Return the fault of an update, empty if it has none."""
        if update.statement is None or update.signature is None or update.key_id is None:
            return "" if self._passed_unsigned(update) else "it is not signed"
        try:
            statement = Statement.FromString(update.statement)
            self._check_signature(update, statement, keys.get(update.key_id))
            self._check_columns(update, statement)
            _check_payload(update, statement)
        except (ValueError, DecodeError) as error:
            return str(error)[:200] or type(error).__name__
        return ""

    def _passed_unsigned(self, update: AcceptedUpdate) -> bool:
        """Return whether the record says of an update without a signature that it was folded."""
        nothing = update.signature is None and update.key_id is None
        return nothing and update.update_id in (self._recorded or {})

    def _check_signature(
        self, update: AcceptedUpdate, statement: Statement, row: KnownKey | None
    ) -> None:
        assert update.statement is not None
        assert update.signature is not None
        if row is None or row.device_id != update.device_id:
            raise StatementError("the key that signed it is not one of its device")
        key = PublicKey(algorithm_of(row.algorithm), row.public_key)
        signature = security_pb2.Signature.FromString(update.signature)
        require_equal("key_id of the signature", signature.key_id, key.key_id)
        require_equal("key_id of the row", update.key_id, key.key_id)
        require_equal("key_id", statement.key_id, key.key_id)
        require_equal("algorithm", int(signature.algorithm), int(key.algorithm))
        opened_at = self._opened_at(statement.round_number)
        if row.retired_at is not None and row.retired_at < opened_at - CLOCK_SLACK:
            raise StatementError("its key was retired before the round was opened")
        self._context.signatures.verify(key, update.statement, signature.signature)

    def _opened_at(self, number: int) -> datetime:
        """Return when the round of a statement was opened: this one, or an earlier one whose updates it takes."""
        least = 1 if self._carries else self._number
        if not least <= number <= self._number:
            raise StatementError(f"its statement is for round {number}")
        if number not in self._opened:
            with self._context.database.read() as session:
                found = training_sessions.get_round(session, self._session_id, number)
                if found is None:
                    raise StatementError(f"its statement is for round {number}, which is missing")
                self._opened[number] = found.opened_at
        return self._opened[number]

    def _check_columns(self, update: AcceptedUpdate, statement: Statement) -> None:
        assert update.statement is not None
        digest = hashlib.sha256(update.statement).hexdigest()
        require_equal("statement_digest", update.statement_digest, digest)
        require_equal("realm", statement.realm, self._context.config.realm)
        require_equal("training_session_id", statement.training_session_id, self._session_id)
        require_equal("update_id", update.update_id, statement.update_id)
        require_equal("device_id", update.device_id, statement.device_id)
        require_equal("base_version", update.base_version, statement.base_version)
        require_equal("example_count", update.example_count, statement.example_count)
        require_equal("metrics", update.metrics, dict(statement.metrics))


def _check_payload(update: AcceptedUpdate, statement: Statement) -> None:
    """Check that the payload is the one that was signed as it traveled, as far as it is at hand."""
    wanted = statement.wire_digest or statement.payload_digest
    require_equal("payload digest", update.payload_digest, wanted)
    if not statement.sealed:
        require_equal("size_bytes", update.size_bytes, statement.size_bytes)
    if update.data is not None:
        require_equal("payload", payload_digest([update.data]), wanted)
    elif update.chunk_digests:
        root = merkle.root(split_digests(update.chunk_digests)).hex()
        require_equal("chunk_digests", root, wanted)


def record_refusals(
    session: Session,
    training_session_id: str,
    round_number: int,
    refusals: Mapping[str, str],
    at: datetime,
) -> None:
    """Reject updates that were not folded, each with its reason, and record this in the audit log.

    Runs in the transaction that ends their round, so that it is recorded once.
    """
    updates.mark_rejected(session, refusals, at)
    for update_id, reason in sorted(refusals.items()):
        details = {
            "training_session_id": training_session_id,
            "round": round_number,
            "reason": reason,
        }
        event = Event("update.evidence_refused", f"update:{update_id}", RiskLevel.HIGH, details)
        audit.record(session, SYSTEM, event, at)
