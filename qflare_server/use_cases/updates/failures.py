"""Failure reports: a device reports that its work on a round failed, with a kind and a short text.

One row per device and round is kept: the latest report and the number of reports.
"""

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.errors import RoundNotOpenError, TrainingSessionNotFoundError
from qflare_server.storage.repository import (
    audit,
    device_failures,
    device_names,
    devices,
    training_sessions,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel
from qflare_server.use_cases.updates.acceptance import refuse_device


class Failures:
    """Records failures that devices report; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def report(
        self,
        caller: Caller,
        device_id: str,
        training_session_id: str,
        round_number: int,
        *,
        kind: str,
        text: str,
    ) -> None:
        """Record a device's failure in the current round; reports for earlier rounds are ignored.

        Args:
            caller: For the audit log.
            device_id: The calling device.
            training_session_id: Training session of the device.
            round_number: Round of the failed work, 0 for the current one.
            kind: Class of the failure, such as OutOfMemoryError.
            text: Error text of the device's program; may be empty.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            RoundNotOpenError: The round has not been opened.
            PermissionDeniedError: Or a subclass: the device is not active.
        """

        def work(session: Session) -> bool:
            training_session = training_sessions.lock_session(session, training_session_id)
            if training_session is None:
                raise TrainingSessionNotFoundError
            number = round_number or training_session.current_round
            if number > training_session.current_round or not training_session.current_round:
                raise RoundNotOpenError(f"round {number} has not been opened")
            refusal = refuse_device(devices.states_of(session, [device_id]).get(device_id))
            if refusal is not None:
                raise refusal
            if number != training_session.current_round:
                return False
            at = self._context.clock()
            is_first = device_failures.record_failure(
                session, training_session_id, number, device_id, kind=kind, text=text, at=at
            )
            if is_first:
                subject = f"training_session:{training_session_id}"
                name = device_names.names_of(session, [device_id]).get(device_id, "")
                details = {"device_name": name, "round": number, "kind": kind}
                event = Event("device.failed", subject, RiskLevel.MEDIUM, details)
                audit.record(session, caller, event, at)
            return training_session.config.HasField("failures")

        if self._context.database.write(work):
            self._context.wake()
