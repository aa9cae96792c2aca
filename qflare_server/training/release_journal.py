"""Journal of the private versions that a coordinator knows to be released, kept outside of the database.

A database restored from a backup lacks the versions released since, and their privacy cost. The journal detects them: a
version that only the journal names was released and lost. Such versions still count against the privacy budget, and the
audit log records that the database was rolled back.

It is a file in the data folder, one JSON object a line, append-only, shared by the processes on one folder. It is
effective only if it is not restored together with the database. If it cannot be written, an error is logged and
training continues.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.storage.repository import audit, global_models, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import RiskLevel
from qflare_server.training.privacy import account_for_lost, lost_versions

logger = logging.getLogger(__name__)

FILE: Final = "privacy-releases.jsonl"


class ReleaseJournal:
    """Digests of released private versions, by training session.

    Args:
        path: The file; it is made when the first version is released.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, training_session_id: str) -> dict[str, int]:
        """Return the version numbers of a training session's released versions, by digest."""
        if not self._path.exists():
            return {}
        found: dict[str, int] = {}
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    if row["training_session_id"] == training_session_id:
                        found[str(row["digest"])] = int(row["version"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    if line.strip():
                        logger.warning("line of %s not read: it is damaged", self._path.name)
        return found

    def append(self, training_session_id: str, versions: Mapping[str, int]) -> None:
        """Append versions, given by digest, durably and in one write."""
        lines = "\n" + "".join(  # a line that a crash has cut ends here
            json.dumps(
                {"training_session_id": training_session_id, "version": number, "digest": digest}
            )
            + "\n"
            for digest, number in versions.items()
        )
        if not versions:
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, lines.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def record_release(
    journal: ReleaseJournal, training_session_id: str, digest: str, version: int
) -> None:
    """Record a version that was just published."""
    try:
        journal.append(training_session_id, {digest: version})
    except OSError as error:
        logger.warning("private release not journaled: %s", error)


def reconcile(
    context: Context,
    journal: ReleaseJournal,
    config: training_pb2.TrainingConfig,
    training_session_id: str,
) -> None:
    """Charge the budget for released versions that the database lacks; add versions that the journal lacks.

    Args:
        context: The coordinator's parts.
        journal: Of this coordinator.
        config: Of the training session; it has privacy.
        training_session_id: Training session.
    """
    try:
        journaled = journal.read(training_session_id)
    except OSError as error:
        logger.warning("journal of private releases not read: %s", error)
        return
    with context.database.read() as session:
        known = global_models.private_versions(session, training_session_id)
    missing = {digest: number for digest, number in known.items() if digest not in journaled}
    try:
        journal.append(training_session_id, missing)
    except OSError as error:
        logger.warning("private releases not journaled: %s", error)
    lost = {digest: number for digest, number in journaled.items() if digest not in known}
    if lost:
        context.database.write(
            lambda session: _account(context, session, config, training_session_id, lost)
        )


def _account(
    context: Context,
    session: Session,
    config: training_pb2.TrainingConfig,
    training_session_id: str,
    lost: Mapping[str, int],
) -> None:
    training_session = training_sessions.lock_session(session, training_session_id)
    if training_session is None:
        return
    fresh = sorted(set(lost) - lost_versions(training_session.privacy_state))
    if not fresh:
        return
    state = account_for_lost(config, training_session.privacy_state, fresh)
    training_sessions.update_session(session, training_session_id, {"privacy_state": state})
    numbers = _numbers(lost[digest] for digest in fresh)
    logger.error(
        "database went back: session=%s released private versions are lost: %s",
        training_session_id,
        numbers,
    )
    event = Event(
        "privacy.restore_detected",
        f"training_session:{training_session_id}",
        RiskLevel.HIGH,
        {"versions": numbers, "digests": ", ".join(fresh)[:1000]},
    )
    audit.record(session, SYSTEM, event, context.clock())


def _numbers(versions: Iterable[int]) -> str:
    return ", ".join(str(version) for version in sorted(versions))[:200]
