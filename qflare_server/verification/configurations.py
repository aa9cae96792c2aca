"""The configurations that were in force in a round, since an administrator may change the rule of rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.storage.repository import evidence, replaced_configs
from qflare_server.storage.training_configs import from_json
from qflare_server.training.rounds import config_digest


class Configurations:
    """The current and the replaced configurations of a training session.

    A configuration was in force from the round that was open when it replaced another to the one that was open when it
    was replaced itself. In those two rounds, the task and the version may name different ones.

    Args:
        stored: Configurations as stored, oldest first, each with the last round that was opened under it; None for the
            current one.
    """

    def __init__(self, stored: Sequence[tuple[Mapping[str, Any], int | None]]) -> None:
        self._known: list[tuple[str, training_pb2.TrainingConfig, int, int | None]] = []
        first = 0
        for config, last in stored:
            parsed = _parse(config)
            if parsed is not None:
                self._known.append((config_digest(parsed), parsed, first, last))
            first = first if last is None else last

    def find(self, round_number: int, digest: str) -> training_pb2.TrainingConfig | None:
        """Return the configuration of a digest that was in force in a round; None if it was not."""
        for known, config, first, last in self._known:
            if known == digest and first <= round_number and (last is None or round_number <= last):
                return config
        return None


def read_configurations(session: Session, training_session_id: str) -> Configurations:
    """Read the configurations of a training session; none without one."""
    stored: list[tuple[Mapping[str, Any], int | None]] = [
        (row.config, row.last_round)
        for row in replaced_configs.list_replaced(session, training_session_id)
    ]
    current = evidence.stored_config(session, training_session_id)
    return Configurations(stored if current is None else [*stored, (current, None)])


def _parse(stored: Mapping[str, Any]) -> training_pb2.TrainingConfig | None:
    """Return a stored configuration; None if it is invalid."""
    try:
        return from_json(stored)
    except (json_format.ParseError, TypeError, ValueError):
        return None
