"""Verification of rounds against their signed tasks.

Deadlines and states are not checked: pausing a training session moves deadlines, and states are not signed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from sqlalchemy.orm import Session

from qflare.evidence.statements import open_task
from qflare.protocol.keysets import KeyRole
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.keys.trust_store import SignerKeys
from qflare_server.storage.records import Round
from qflare_server.storage.repository import evidence, global_models, membership, views
from qflare_server.storage.training_configs import from_json
from qflare_server.verification.configurations import Configurations, read_configurations
from qflare_server.verification.findings import (
    Finding,
    Tally,
    differences,
    faults,
    walk,
)


class RoundVerification:
    """One pass over the rounds of every training session.

    Args:
        context: The coordinator's dependencies.
        keys: Keys of valid signers.
        tally: Counts of what was checked.
    """

    def __init__(self, context: Context, keys: SignerKeys, tally: Tally) -> None:
        self._context = context
        self._keys = keys
        self._tally = tally

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        for training_session_id in walk(self._context.database, evidence.session_ids, "", str):
            yield from self._rounds(training_session_id)

    def _rounds(self, training_session_id: str) -> Iterator[Finding]:
        with self._context.database.read() as session:
            stored = evidence.stored_config(session, training_session_id)
            configurations = read_configurations(session, training_session_id)
            open_to = list(membership.session_groups(session, training_session_id))
        if stored is not None and open_to != _groups(stored):
            yield Finding(
                "round", training_session_id, "its groups are not those of its configuration"
            )

        def read(session: Session, after: int, limit: int) -> Sequence[Round]:
            return views.rounds_from(session, training_session_id, after + 1, limit)

        rows = walk(self._context.database, read, 0, lambda found: found.number)
        yield from faults(
            "round",
            rows,
            lambda row: self._check(row, configurations),
            lambda row: f"{training_session_id} round {row.number}",
            self._tally,
        )

    def _check(self, row: Round, configurations: Configurations) -> None:
        if row.task is None:
            self._tally.unchecked["rounds without a task"] += 1
            return
        envelope = security_pb2.SignedEnvelope.FromString(row.task)
        statement = open_task(envelope, self._keys[KeyRole.TASK], self._context.config.realm)
        with self._context.database.read() as session:
            base = global_models.get_model(session, row.training_session_id, row.base_version)
            base_digest = None if base is None else base.digest
        changed = differences(
            {
                "training_session_id": (row.training_session_id, statement.training_session_id),
                "number": (row.number, statement.round_number),
                "base_version": (row.base_version, statement.base_version),
                "base": (base_digest, statement.base_digest),
                "nonce": (row.nonce, statement.task_nonce),
                "configuration": (
                    True,
                    configurations.find(row.number, statement.config_digest) is not None,
                ),
            }
        )
        if changed:
            raise ValueError(f"not what was signed: {', '.join(changed)}")


def _groups(stored: Mapping[str, Any]) -> list[str]:
    """Return the groups in a configuration; none if it is no longer a valid configuration."""
    try:
        return list(from_json(stored).groups)
    except (json_format.ParseError, TypeError, ValueError):
        return []
