"""Stages of a round with secure aggregation with neighbors: who is in a group, and what the group waits for.

    advertise -> share -> train -> confirm -> reveal -> opened

Groups are formed when enough devices have advertised, and go on alone: `share` ends when all members have sent shares,
`train` with the round, `confirm` when all that are in the sum have confirmed, `reveal` when all secrets that are needed
can be opened; the steps before and after training also end after a time. A group that lost too many devices for its
sum to be opened, or for its parts to stay hidden, is aborted, and the others go on.

Every decision is made once, in a transaction that holds the lock of the round's row: a coordinator that restarts, and
another one, find the same roster, the same sharers and the same survivors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from qflare.crypto.signing import tagged_hash
from qflare.evidence.neighbors import check_survivors, sharers_digest, survivors_digest
from qflare.evidence.statements import StatementError
from qflare.evidence.unmasking import NeighborPolicy
from qflare.masking.graph_parameters import MIN_GROUP
from qflare.masking.neighbor_graph import NeighborGraph, roster_digest
from qflare.v1 import training_pb2
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import audit, neighbors, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.repository.neighbors import StoredGroup, StoredMember
from qflare_server.storage.tables import GroupStage, RiskLevel, RoundState
from qflare_server.training.config import deadline_s
from qflare_server.training.rounds import close_if_complete

_GROUPING_TAG = "qflare/v1/neighbor-groups"


def has_neighbors(config: training_pb2.TrainingConfig) -> bool:
    """Return whether a training session has secure aggregation with neighbors."""
    return config.secure_aggregation.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS


def step_timeout(config: training_pb2.TrainingConfig) -> timedelta:
    """Return the time for a step before or after training."""
    stated = config.secure_aggregation.step_timeout
    return timedelta(seconds=stated.seconds + stated.nanos / 1e9)


def policy_of(config: training_pb2.TrainingConfig) -> NeighborPolicy:
    """Return how the groups of a training session are formed."""
    policy = config.secure_aggregation
    return NeighborPolicy(policy.corrupt_fraction, policy.dropout_fraction)


def graph_of(config: training_pb2.TrainingConfig, members: Sequence[StoredMember]) -> NeighborGraph:
    """Return the graph of a group.

    Raises:
        StatementError: There is none for so many members.
    """
    return policy_of(config).graph(sorted(member.digest for member in members))


def is_due(
    config: training_pb2.TrainingConfig,
    current: Round,
    groups: Sequence[StoredGroup],
    members: Sequence[StoredMember],
    now: datetime,
) -> bool:
    """Return whether `advance` would decide something, from what a read shows."""
    if not groups:
        return current.state == RoundState.OPEN.value and is_enough(
            config, current, len(_active(members)), now
        )
    return any(
        _is_complete(group, _of(group, members), current) or _is_late(group, now)
        for group in groups
        if not group.has_ended
    )


def advertising_ends_at(config: training_pb2.TrainingConfig, current: Round) -> datetime:
    """Return when the time to advertise ends; like the deadline of a round, it restarts when it is resumed."""
    return current.deadline_at - timedelta(seconds=deadline_s(config)) + step_timeout(config)


def next_deadline(
    config: training_pb2.TrainingConfig,
    current: Round,
    groups: Sequence[StoredGroup],
    now: datetime,
) -> datetime | None:
    """Return when the next step ends for lack of time, later than now; None if no step does."""
    timed = [
        group.deadline_at
        for group in groups
        if not group.has_ended and group.stage != GroupStage.TRAIN.value
    ]
    if not groups:
        timed = [advertising_ends_at(config, current)]
    return min((at for at in timed if at > now), default=None)


def advance(
    session: Session, training_session: TrainingSession, current: Round, now: datetime
) -> bool:
    """Decide what can be decided in a round; return whether anything was.

    Args:
        session: Transaction that holds the locks of the training session and the round.
        training_session: With secure aggregation with neighbors.
        current: Its round, open or closed.
        now: The time.
    """
    config = training_session.config
    stages = _Stages(session, training_session, current, now)
    groups = neighbors.groups_of(session, training_session.id, current.number)
    members = neighbors.members_of(session, training_session.id, current.number)
    if not groups:
        return (
            current.state == RoundState.OPEN.value
            and is_enough(config, current, len(_active(members)), now)
            and stages.form_groups(_active(members)[: current.target])
        )
    changed = [
        stages.advance_group(group, _of(group, members)) for group in groups if not group.has_ended
    ]
    if any(changed):
        stages.set_target()
    return any(changed)


@dataclass(frozen=True)
class _Stages:
    """Decisions on one round."""

    session: Session
    training_session: TrainingSession
    current: Round
    now: datetime

    @property
    def _key(self) -> tuple[str, int]:
        return self.training_session.id, self.current.number

    @property
    def _config(self) -> training_pb2.TrainingConfig:
        return self.training_session.config

    def form_groups(self, members: Sequence[StoredMember]) -> bool:
        """Fix the rosters."""
        parts = split_groups(
            [member.digest for member in members], self._config.secure_aggregation.group_size
        )
        devices = {member.digest: member.device_id for member in members}
        deadline = self.now + step_timeout(self._config)
        for number, part in enumerate(parts, 1):
            roster, stage = roster_digest(sorted(part)), GroupStage.SHARE.value
            group = StoredGroup(number, stage, "", roster, None, None, deadline)
            ids = [devices[digest] for digest in part]
            neighbors.insert_group(self.session, *self._key, group, ids)
            self._record(number, GroupStage.SHARE, {"members": len(part)})
            try:
                policy_of(self._config).graph(sorted(part))
            except StatementError as error:
                self.abort(group, str(error))
        return True

    def advance_group(self, group: StoredGroup, members: Sequence[StoredMember]) -> bool:
        """Move a group to its next stage if it has all that it waits for, or its time is up."""
        if not (_is_complete(group, members, self.current) or _is_late(group, self.now)):
            return False
        try:
            if group.stage == GroupStage.SHARE.value:
                self._fix_sharers(group, members)
            elif group.stage == GroupStage.TRAIN.value:
                self._fix_survivors(group, members)
            elif group.stage == GroupStage.CONFIRM.value:
                self._begin_reveal(group, members)
            else:
                return False  # whether the reveals suffice is decided where they are opened
        except StatementError as error:
            self.abort(group, str(error))
        return True

    def abort(self, group: StoredGroup, reason: str) -> None:
        """Abort a group."""
        self._move(group, GroupStage.ABORTED, {"reason": reason}, stage_reason=reason[:500])

    def set_target(self) -> None:
        """Close the round to updates once all devices that can still send one have, and end one that has no quorum."""
        if self.current.state != RoundState.OPEN.value:
            return
        groups = neighbors.groups_of(self.session, *self._key)
        if any(group.stage == GroupStage.SHARE.value for group in groups):
            return
        going = {group.number for group in groups if not group.has_ended}
        members = neighbors.members_of(self.session, *self._key)
        count = sum(member.is_sharer and member.group_number in going for member in members)
        values: dict[str, object] = {"target": max(count, self.current.quorum)}
        if count < self.current.quorum:
            values["deadline_at"] = self.now
        training_sessions.update_round(self.session, *self._key, values)
        close_if_complete(self.session, *self._key, self.now)

    def _fix_sharers(self, group: StoredGroup, members: Sequence[StoredMember]) -> None:
        graph = graph_of(self._config, members)
        sharing = [member for member in members if member.has_shares]
        digests = {member.digest: member.digest for member in sharing}
        check_survivors(graph, digests, digests)
        entries = {item.digest: item.shares_digest or "" for item in sharing}
        for member in sharing:
            neighbors.update_member(self.session, *self._key, member.device_id, {"is_sharer": True})
        details = {"sharers": len(sharing)}
        fixed = {"sharers_digest": sharers_digest(graph, entries)}
        self._move(group, GroupStage.TRAIN, details, **fixed)

    def _fix_survivors(self, group: StoredGroup, members: Sequence[StoredMember]) -> None:
        graph, known = (
            graph_of(self._config, members),
            neighbors.update_digests(self.session, *self._key),
        )
        sharers = {member.digest: member.digest for member in members if member.is_sharer}
        entries = {
            member.digest: known[member.device_id]
            for member in members
            if member.device_id in known
        }
        check_survivors(graph, sharers, entries)
        least = self._config.secure_aggregation.min_cohort
        if len(entries) < least:
            raise StatementError(f"{len(entries)} updates, want {least}")
        for member in members:
            if member.digest in entries:
                values = {"update_digest": entries[member.digest]}
                neighbors.update_member(self.session, *self._key, member.device_id, values)
        assert group.sharers_digest is not None
        fixed = {"survivors_digest": survivors_digest(graph, group.sharers_digest, entries)}
        self._move(group, GroupStage.CONFIRM, {"updates": len(entries)}, **fixed)

    def _begin_reveal(self, group: StoredGroup, members: Sequence[StoredMember]) -> None:
        confirmed = {member.digest for member in members if member.has_confirmed}
        graph = graph_of(self._config, members)
        threshold = graph.parameters.threshold

        def near(owner: str, among: Collection[str]) -> int:
            return sum(item in among for item in graph.neighbors(owner))

        # Who has fewer confirming neighbors reveals nothing.
        able = {item for item in confirmed if near(item, confirmed) >= threshold}
        least = min(near(member.digest, able) for member in members if member.is_sharer)
        if least < threshold:
            raise StatementError(
                f"{len(confirmed)} devices confirmed; {least} neighbors of one can reveal shares, want {threshold}"
            )
        self._move(group, GroupStage.REVEAL, {"confirmed": len(confirmed)})

    def _move(
        self, group: StoredGroup, stage: GroupStage, details: Mapping[str, object], **values: str
    ) -> None:
        deadline = self.now + step_timeout(self._config)
        changed = {"stage": stage.value, "deadline_at": deadline, **values}
        neighbors.update_group(self.session, *self._key, group.number, changed)
        self._record(group.number, stage, details)

    def _record(self, number: int, stage: GroupStage, details: Mapping[str, object]) -> None:
        risk = RiskLevel.MEDIUM if stage is GroupStage.ABORTED else RiskLevel.LOW
        shown = {"round": self.current.number, "group": number, "stage": stage.value, **details}
        subject = f"training_session:{self.training_session.id}"
        event = Event("round.group", subject, risk, shown)
        audit.record(self.session, SYSTEM, event, self.now)


def end_group(
    session: Session,
    training_session: TrainingSession,
    current: Round,
    number: int,
    problem: str,
    now: datetime,
) -> bool:
    """End a group that reveals: as opened, or as aborted because of a problem; return whether it was still revealing.

    Args:
        session: Transaction that holds the locks of the training session and the round.
        training_session: Training session.
        current: Its round.
        number: Group.
        problem: Why its sum cannot be opened; empty if it can.
        now: The time.
    """
    stages = _Stages(session, training_session, current, now)
    groups = neighbors.groups_of(session, training_session.id, current.number)
    found = [group for group in groups if group.number == number]
    if not found or found[0].stage != GroupStage.REVEAL.value:
        return False
    if problem:
        stages.abort(found[0], problem)
    else:
        stages._move(found[0], GroupStage.OPENED, {})  # noqa: SLF001 - same module
    return True


def split_groups(digests: Sequence[str], group_size: int) -> list[list[str]]:
    """Return the members of each group: as many groups as have `group_size` members, in sizes that differ by one.

    Who is in which group follows from all advertisements together.
    """
    count = max(1, len(digests) // group_size) if group_size else 1
    joined = "".join(sorted(digests)).encode()
    order = sorted(digests, key=lambda item: tagged_hash(_GROUPING_TAG, joined, item.encode()))
    return [order[number::count] for number in range(count)]


def is_awaited(member: StoredMember, stage: str, updated: Collection[str]) -> bool:
    """Return whether a group waits for a member; for a suspended one it does not.

    Args:
        member: Of the group.
        stage: Of the group.
        updated: Ids of the devices that have sent an update in the round.
    """
    if not member.is_active:
        return False
    if stage == GroupStage.SHARE.value:
        return not member.has_shares
    if stage == GroupStage.TRAIN.value:
        return member.is_sharer and member.device_id not in updated
    if not member.update_digest:
        return False
    if stage == GroupStage.CONFIRM.value:
        return not member.has_confirmed
    return stage == GroupStage.REVEAL.value and member.has_confirmed and not member.has_revealed


def _active(members: Sequence[StoredMember]) -> Sequence[StoredMember]:
    """Return the members that can take further steps: not those suspended since they have advertised."""
    return [member for member in members if member.is_active]


def _of(group: StoredGroup, members: Sequence[StoredMember]) -> list[StoredMember]:
    return [member for member in members if member.group_number == group.number]


def is_enough(
    config: training_pb2.TrainingConfig, current: Round, count: int, now: datetime
) -> bool:
    """Return whether groups can be formed: all devices wanted have advertised, or enough and the time is up.

    Args:
        config: Of the training session.
        current: The open round.
        count: Active devices that have advertised.
        now: The time.
    """
    if count >= current.target:
        return True
    least = max(MIN_GROUP, current.quorum)
    return count >= least and now >= advertising_ends_at(config, current)


def _is_complete(group: StoredGroup, members: Sequence[StoredMember], current: Round) -> bool:
    if group.stage == GroupStage.TRAIN.value:
        return current.state == RoundState.CLOSED.value
    if group.stage in _TIMED:
        return not any(is_awaited(member, group.stage, ()) for member in members)
    return False


def _is_late(group: StoredGroup, now: datetime) -> bool:
    return group.stage in _TIMED and group.deadline_at <= now


_TIMED = frozenset({GroupStage.SHARE.value, GroupStage.CONFIRM.value})
