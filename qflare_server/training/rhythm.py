"""Rhythm of a training session: rounds of one base version, or asynchronous rounds that take stale updates too."""

from typing import Final

from qflare.v1 import training_pb2

ASYNCHRONOUS: Final = frozenset({"fedbuff"})
"""Strategies whose rounds are asynchronous."""


def is_asynchronous(config: training_pb2.TrainingConfig) -> bool:
    """Return whether updates against older versions are accepted."""
    carries = config.rounds.late_update_action == training_pb2.LATE_UPDATE_ACTION_CARRY
    return carries or config.strategy.name in ASYNCHRONOUS
