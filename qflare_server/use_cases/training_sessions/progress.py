"""Progress of training sessions and rounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from qflare_server.storage.records import GlobalModel, Round, TrainingSession
from qflare_server.storage.repository.neighbors import GroupProgress
from qflare_server.storage.tables import RoundState


@dataclass(frozen=True)
class Progress:
    """Aggregation progress of a training session."""

    session: TrainingSession
    round: Round | None
    pending_count: int
    latest: GlobalModel | None
    remaining_s: float | None
    groups: GroupProgress | None = None

    @property
    def missing_count(self) -> int:
        """Updates that the open round needs to close before its deadline."""
        if self.round is None or self.round.state != RoundState.OPEN.value:
            return 0
        return max(0, self.round.target - self.round.accepted_count)


@dataclass(frozen=True)
class Participation:
    """A round, and the first hundred of its selected devices that sent no update; empty where all may take part."""

    round: Round
    absent_ids: Sequence[str]
