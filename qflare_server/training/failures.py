"""The limit on devices that fail in a round: whether too many have, and the end of the round or training session."""

import math
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.storage.records import Round
from qflare_server.storage.repository import device_failures

TOO_MANY_FAILED: Final = "too many devices failed"
"""Prefix of the reason of a round or training session that ended because of failing devices."""


@dataclass(frozen=True)
class TooManyFailed:
    """More devices of a round failed than may.

    Attributes:
        failed_count: How many failed, counted up to one more than may.
        allowed_count: How many may.
        device_count: How many may take part in the round.
    """

    failed_count: int
    allowed_count: int
    device_count: int

    @property
    def reason(self) -> str:
        """Reason of the end, for people."""
        return (
            f"{TOO_MANY_FAILED}: at least {self.failed_count} of {self.device_count}, "
            f"at most {self.allowed_count} may"
        )


def find_too_many(
    session: Session, config: training_pb2.TrainingConfig, current: Round
) -> TooManyFailed | None:
    """Return how a round exceeds the limit on failing devices; None if it does not, or there is no limit."""
    policy = config.failures
    if not policy.action:
        return None
    is_drawn, of_round = current.selected_count != 0, (current.training_session_id, current.number)
    count = device_failures.count_participants(session, *of_round, is_drawn=is_drawn)
    allowed = _allowed(policy, count)
    failed = device_failures.count_failed(session, *of_round, is_drawn=is_drawn, limit=allowed + 1)
    return TooManyFailed(failed, allowed, count) if failed > allowed else None


def _allowed(policy: training_pb2.FailurePolicy, device_count: int) -> int:
    """Return how many devices of a round may fail under the tighter limit."""
    allowed = device_count
    if policy.HasField("max_failures"):
        allowed = min(allowed, policy.max_failures)
    if policy.HasField("max_failed_fraction"):
        allowed = min(allowed, math.floor(policy.max_failed_fraction * device_count))
    return allowed
