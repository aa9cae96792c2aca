"""The fold of a round with secure aggregation with neighbors: sums of groups, opened by the shares of their members.

All updates of the round are added up in one ring. When every group has opened or was aborted, the updates of aborted
groups are subtracted again, and the masks that are left are removed. What a group still waits for is decided in
`training.neighbor_stages`; whether its revealed shares suffice is found here, because it takes arithmetic.
"""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from qflare.masking.masks import Mask
from qflare.masking.neighbors import NeighborError, NotEnoughSharesError
from qflare.v1 import security_pb2
from qflare_server.aggregation.masked_fold import MaskedRoundFold
from qflare_server.aggregation.unmasking import opened_task
from qflare_server.errors import HelperRefusedError
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import neighbors, training_sessions
from qflare_server.storage.repository.neighbors import StoredGroup, StoredMember
from qflare_server.storage.tables import GroupStage, TrainingSessionState
from qflare_server.strategies import NotEnoughUpdatesError
from qflare_server.training import neighbor_stages
from qflare_server.training.neighbor_opening import (
    GroupContents,
    OpenedGroup,
    open_group,
    read_contents,
)

logger = logging.getLogger(__name__)


class NeighborRoundFold(MaskedRoundFold):
    """Aggregates one round with secure aggregation with neighbors; not thread-safe. Arguments as `MaskedRoundFold`."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._endings: dict[int, str] = {}
        self._tried: dict[int, int] = {}
        self._digest_list: list[str] = []
        self._next: datetime | None = None

    def awaits_decision(self) -> bool:
        """Return whether `decide` has something to decide."""
        # Read before the groups: a resumption in between would move the deadlines that were read.
        is_paused = self._is_paused()
        current, groups, members = self._read()
        if current is None or is_paused:
            self._endings, self._tried, self._next = {}, {}, None
            return False
        config, now = self.plan.config, self._context.clock()
        self._next = neighbor_stages.next_deadline(config, current, groups, now)
        revealing = [group for group in groups if group.stage == GroupStage.REVEAL.value]
        known = {group.number for group in revealing}
        self._endings = {key: text for key, text in self._endings.items() if key in known}
        for group in revealing:
            if group.number not in self._endings:
                self._try(group, members, now)
        return bool(self._endings) or neighbor_stages.is_due(config, current, groups, members, now)

    def decide(
        self, session: Session, training_session: TrainingSession, current: Round, now: datetime
    ) -> bool:
        """Decide what is due; return whether anything was.

        Args:
            session: Transaction that holds the locks of the training session and the round.
            training_session: Training session.
            current: Its round.
            now: The time.
        """
        ended = [
            neighbor_stages.end_group(session, training_session, current, number, problem, now)
            for number, problem in self._endings.items()
        ]
        return neighbor_stages.advance(session, training_session, current, now) or any(ended)

    def next_deadline(self) -> datetime | None:
        """Return when the next step ends for lack of time, as of the last `awaits_decision`."""
        return self._next

    def is_ready(self) -> bool:
        """Return whether all groups have ended, and their sums are opened."""
        _current, groups, _members = self._read()
        return bool(groups) and all(group.has_ended for group in groups) and super().is_ready()

    def _read(self) -> tuple[Round | None, Sequence[StoredGroup], Sequence[StoredMember]]:
        key = self.plan.training_session_id, self.plan.number
        with self._context.database.read() as session:
            current = training_sessions.get_round(session, *key)
            return (
                current,
                neighbors.groups_of(session, *key),
                neighbors.members_of(session, *key),
            )

    def _is_paused(self) -> bool:
        """Return whether steps are not decided, because devices cannot take them either."""
        with self._context.database.read() as session:
            found = training_sessions.get_session(session, self.plan.training_session_id)
        return found is None or found.state != TrainingSessionState.RUNNING.value

    def _try(self, group: StoredGroup, members: Sequence[StoredMember], now: datetime) -> None:
        """Find out whether the sum of a group can be opened, each time that another member has revealed."""
        own = [item for item in members if item.group_number == group.number and item.update_digest]
        count = sum(item.has_revealed for item in own)
        awaited = any(neighbor_stages.is_awaited(item, group.stage, ()) for item in own)
        is_last = not awaited or group.deadline_at <= now
        if self._tried.get(group.number) == count and not is_last:
            return
        self._tried[group.number] = count
        try:
            opened = self._open_group(group.number)
        except NotEnoughSharesError as error:
            if is_last:
                self._endings[group.number] = str(error)
        except NeighborError as error:
            self._endings[group.number] = f"{error}: {self._devices(group.number, error)}"
        else:
            if opened.liars:
                logger.warning(
                    "wrong shares revealed: session=%s round=%d group=%d devices=%s",
                    *(self.plan.training_session_id, self.plan.number, group.number),
                    list(opened.liars),
                )
            self._endings[group.number] = ""

    def _devices(self, number: int, error: NeighborError) -> str:
        contents = self._contents(number)
        return ", ".join(contents.device_of(item) for item in error.members)

    def _open_group(self, number: int) -> OpenedGroup:
        return open_group(self._contents(number))

    def _contents(self, number: int) -> GroupContents:
        plan = self.plan
        with self._context.database.read() as session:
            return read_contents(
                session, plan.training_session_id, plan.number, plan.config, number
            )

    def _unmask(self, _executor: ThreadPoolExecutor) -> None:
        """Unmask the sum of the groups that were opened.

        Raises:
            NotEnoughUpdatesError: Fewer updates are left than a sum must have.
            HelperRefusedError: The rows of a group are not those with which it was opened.
        """
        current, groups, members = self._read()
        self._masking = self._masking_of(opened_task(None if current is None else current.task))
        opened = [group for group in groups if group.stage == GroupStage.OPENED.value]
        self._leave_out(self._aborted({group.number for group in opened}, groups, members))
        self._require_quorum()
        self._digest_list = []
        for group in opened:
            try:
                self._take_group(group.number, self._open_group(group.number))
            except (NotEnoughSharesError, NeighborError) as error:
                raise HelperRefusedError(f"group {group.number}: {error}") from error
        self._read_totals()

    def _require_quorum(self) -> None:
        self._require_cohort()
        count, quorum = len(self._digests), self.plan.config.rounds.quorum
        if count < quorum:
            raise NotEnoughUpdatesError(
                f"{count} updates are in groups that could be opened, want {quorum}"
            )

    def _aborted(
        self, opened: set[int], groups: Sequence[StoredGroup], members: Sequence[StoredMember]
    ) -> dict[str, str]:
        """Return the reasons by id of the updates that are in no opened group."""
        reasons = {group.number: group.stage_reason for group in groups}
        kept = {item.update_digest for item in members if item.group_number in opened}
        by_digest = {item.update_digest: item.group_number for item in members}
        return {
            update_id: f"its group was aborted: {reasons.get(by_digest.get(digest) or 0, '')}"[:500]
            for update_id, digest in self._digests.items()
            if digest not in kept
        }

    def _take_group(self, number: int, group: OpenedGroup) -> None:
        """Take the sum of an opened group into the version, and note its transcript.

        Raises:
            HelperRefusedError: An update of the group is missing here, without which its sum says nothing.
        """
        known = set(self._digests.values())
        members = [member.update_digest.hex() for member in group.transcript.members]
        if not known.issuperset(filter(None, members)):
            raise HelperRefusedError(
                f"group {number} was opened for an update that is missing or altered"
            )
        self._remove_masks(number, group)
        self._digest_list.append(hashlib.sha256(group.serialized()).hexdigest())

    def _remove_masks(self, _number: int, group: OpenedGroup) -> None:
        for seed, sign in group.masks():
            mask = Mask(seed)
            if sign > 0:
                mask.subtract_from(self._sum, 0)
            else:
                mask.add_to(self._sum, 0)

    def unmasking(self) -> security_pb2.ModelUnmasking:
        """Return the transcripts as the version's statement names them."""
        assert self._masking is not None
        return security_pb2.ModelUnmasking(
            task_digest=self._masking.task_digest, answer_digests=self._digest_list
        )
