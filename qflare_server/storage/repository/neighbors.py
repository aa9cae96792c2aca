"""Groups of secure aggregation with neighbors, and what their members have sent."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, case, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.epochs import bump_rounds
from qflare_server.storage.prepared import PreparedStatement
from qflare_server.storage.repository.training_sessions import WorkQuery
from qflare_server.storage.tables import (
    DeviceState,
    GroupStage,
    RoundState,
    TrainingSessionState,
)

DEVICES = tables.Device.__table__
GROUPS = tables.NeighborGroup.__table__
MEMBERS = tables.NeighborMember.__table__
ROUNDS = tables.Round.__table__
SESSIONS = tables.TrainingSession.__table__
UPDATES = tables.ModelUpdate.__table__

ENDED = frozenset({GroupStage.OPENED.value, GroupStage.ABORTED.value})
"""Stages of a group that waits for nothing more."""


class StoredGroup(NamedTuple):
    """A group of a round."""

    number: int
    stage: str
    stage_reason: str
    roster_digest: str
    sharers_digest: str | None
    survivors_digest: str | None
    deadline_at: datetime

    @property
    def has_ended(self) -> bool:
        """Whether it waits for nothing more."""
        return self.stage in ENDED


class StoredMember(NamedTuple):
    """A member of a group, without what it has sent, of which is only said whether it is there."""

    device_id: str
    digest: str
    group_number: int | None
    is_sharer: bool
    update_digest: str | None
    shares_digest: str | None
    has_confirmed: bool
    has_revealed: bool
    is_active: bool

    @property
    def has_shares(self) -> bool:
        """Whether it has sent shares."""
        return self.shares_digest is not None


class Work(NamedTuple):
    """Step of a round that waits for a device."""

    training_session_id: str
    round_number: int
    base_version: int
    deadline_at: datetime
    task: bytes
    group_number: int
    stage: str


_IS_OF_GROUP = and_(
    MEMBERS.c.training_session_id == GROUPS.c.training_session_id,
    MEMBERS.c.round_number == GROUPS.c.round_number,
    MEMBERS.c.group_number == GROUPS.c.number,
)
_IS_OF_ROUND = and_(
    ROUNDS.c.training_session_id == GROUPS.c.training_session_id,
    ROUNDS.c.number == GROUPS.c.round_number,
)
_HAS_UPDATE = exists().where(
    UPDATES.c.training_session_id == ROUNDS.c.training_session_id,
    UPDATES.c.round_number == ROUNDS.c.number,
    UPDATES.c.device_id == bindparam("device"),
)
_IN_SUM = MEMBERS.c.update_digest.is_not(None)
_IS_ACTIVE = DEVICES.c.state == DeviceState.ACTIVE.value
_WORK = (
    select(
        ROUNDS.c.training_session_id,
        ROUNDS.c.number,
        ROUNDS.c.base_version,
        ROUNDS.c.deadline_at,
        ROUNDS.c.task,
        GROUPS.c.number,
        GROUPS.c.stage,
    )
    .select_from(
        MEMBERS.join(GROUPS, _IS_OF_GROUP)
        .join(ROUNDS, _IS_OF_ROUND)
        .join(SESSIONS, SESSIONS.c.id == ROUNDS.c.training_session_id)
    )
    .where(
        MEMBERS.c.device_id == bindparam("device"),
        SESSIONS.c.state == TrainingSessionState.RUNNING.value,
        or_(ROUNDS.c.state == RoundState.OPEN.value, ROUNDS.c.state == RoundState.CLOSED.value),
        or_(
            and_(GROUPS.c.stage == GroupStage.SHARE.value, MEMBERS.c.shares_digest.is_(None)),
            and_(
                GROUPS.c.stage == GroupStage.TRAIN.value,
                MEMBERS.c.is_sharer,
                ROUNDS.c.state == RoundState.OPEN.value,
                ROUNDS.c.deadline_at > bindparam("at"),
                ~_HAS_UPDATE,
            ),
            and_(
                GROUPS.c.stage == GroupStage.CONFIRM.value,
                _IN_SUM,
                MEMBERS.c.confirmation.is_(None),
            ),
            and_(
                GROUPS.c.stage == GroupStage.REVEAL.value,
                MEMBERS.c.confirmation.is_not(None),
                MEMBERS.c.reveal.is_(None),
            ),
        ),
    )
    .order_by(ROUNDS.c.opened_at)
    .limit(1)
)
_WORKS = WorkQuery(_WORK)


def find_work(
    session: Session,
    device_id: str,
    training_session_id: str,
    at: datetime,
    *,
    answers_queries: bool,
) -> Work | None:
    """Return the step that waits for a device, of one training session, or of all if empty.

    Steps of queries of federated analytics count only if the device answers them: one that has stopped doing so since
    it advertised would otherwise get nothing else to do.
    """
    rows = _WORKS.rows(session, device_id, training_session_id, at, answers_queries=answers_queries)
    return Work(*rows[0]) if rows else None


_WAITING = PreparedStatement(
    select(ROUNDS.c.training_session_id, ROUNDS.c.base_version)
    .select_from(
        MEMBERS.join(
            ROUNDS,
            and_(
                MEMBERS.c.training_session_id == ROUNDS.c.training_session_id,
                MEMBERS.c.round_number == ROUNDS.c.number,
            ),
        ).join(SESSIONS, SESSIONS.c.id == ROUNDS.c.training_session_id)
    )
    .where(
        MEMBERS.c.device_id == bindparam("device"),
        SESSIONS.c.state == TrainingSessionState.RUNNING.value,
        or_(ROUNDS.c.state == RoundState.OPEN.value, ROUNDS.c.state == RoundState.CLOSED.value),
    )
    .order_by(ROUNDS.c.opened_at)
    .limit(1)
)


def find_waiting(session: Session, device_id: str) -> tuple[str, int] | None:
    """Return training session and base version of a round in progress in which a device has advertised, or None.

    Queries count in any case: a device that has refused one leaves queries out of its next poll, and may be awaited in
    the group of another one.
    """
    rows = _WAITING.rows(session, {"device": device_id})
    return (rows[0][0], rows[0][1]) if rows else None


def insert_group(
    session: Session,
    training_session_id: str,
    round_number: int,
    group: StoredGroup,
    device_ids: Collection[str],
) -> None:
    """Insert a group, and put members into it."""
    key = {"training_session_id": training_session_id, "round_number": round_number}
    session.execute(insert(GROUPS).values(**key, **group._asdict()))
    session.execute(
        update(MEMBERS)
        .where(*_of_round(training_session_id, round_number), MEMBERS.c.device_id.in_(device_ids))
        .values(group_number=group.number)
    )
    bump_rounds(session)


def update_group(
    session: Session,
    training_session_id: str,
    round_number: int,
    number: int,
    values: Mapping[str, Any],
) -> None:
    """Update columns of a group; devices notice at their next poll."""
    session.execute(
        update(GROUPS)
        .where(
            GROUPS.c.training_session_id == training_session_id,
            GROUPS.c.round_number == round_number,
            GROUPS.c.number == number,
        )
        .values(**values)
    )
    bump_rounds(session)


def groups_of(
    session: Session, training_session_id: str, round_number: int
) -> Sequence[StoredGroup]:
    """Return the groups of a round; empty until the roster is fixed."""
    query = (
        select(*(GROUPS.c[name] for name in StoredGroup._fields))
        .where(
            GROUPS.c.training_session_id == training_session_id,
            GROUPS.c.round_number == round_number,
        )
        .order_by(GROUPS.c.number)
    )
    return [StoredGroup(*row) for row in session.execute(query)]


def insert_member(session: Session, values: Mapping[str, Any]) -> None:
    """Insert the advertisement of a device."""
    session.execute(insert(MEMBERS).values(**values))


def members_of(
    session: Session,
    training_session_id: str,
    round_number: int,
    *,
    group: int | None = None,
    device_id: str = "",
) -> Sequence[StoredMember]:
    """Return the devices that have advertised in a round, by the digests of their advertisements.

    Args:
        session: Open session.
        training_session_id: Training session.
        round_number: Round.
        group: Only the members of this group; None means all.
        device_id: Only this device; empty means all.
    """
    wanted = [*_of_round(training_session_id, round_number)]
    if group is not None:
        wanted.append(MEMBERS.c.group_number == group)
    if device_id:
        wanted.append(MEMBERS.c.device_id == device_id)
    query = (
        select(
            MEMBERS.c.device_id,
            MEMBERS.c.advertisement_digest,
            MEMBERS.c.group_number,
            MEMBERS.c.is_sharer,
            MEMBERS.c.update_digest,
            MEMBERS.c.shares_digest,
            MEMBERS.c.confirmation.is_not(None),
            MEMBERS.c.reveal.is_not(None),
            _IS_ACTIVE,
        )
        .select_from(MEMBERS.join(DEVICES, DEVICES.c.id == MEMBERS.c.device_id))
        .where(*wanted)
        .order_by(MEMBERS.c.advertisement_digest)
    )
    return [StoredMember(*row) for row in session.execute(query)]


def count_members(session: Session, training_session_id: str, round_number: int) -> int:
    """Return how many devices have advertised in a round and are still active."""
    query = (
        select(func.count())
        .select_from(MEMBERS.join(DEVICES, DEVICES.c.id == MEMBERS.c.device_id))
        .where(*_of_round(training_session_id, round_number), _IS_ACTIVE)
    )
    return session.scalars(query).one()


class SharerFacts(NamedTuple):
    """What the update of a member that sent shares has to name."""

    advertisement_digest: str
    roster_digest: str
    sharers_digest: str


def sharers_among(
    session: Session, training_session_id: str, round_number: int, device_ids: Collection[str]
) -> dict[str, SharerFacts]:
    """Return those devices that have sent shares in a group that waits for updates, with what their updates name."""
    query = (
        select(
            MEMBERS.c.device_id,
            MEMBERS.c.advertisement_digest,
            GROUPS.c.roster_digest,
            GROUPS.c.sharers_digest,
        )
        .select_from(MEMBERS.join(GROUPS, _IS_OF_GROUP))
        .where(
            *_of_round(training_session_id, round_number),
            MEMBERS.c.device_id.in_(sorted(device_ids)),
            MEMBERS.c.is_sharer,
            GROUPS.c.stage == GroupStage.TRAIN.value,
        )
    )
    return {row[0]: SharerFacts(*row[1:]) for row in session.execute(query)}


def contents(
    session: Session,
    training_session_id: str,
    round_number: int,
    column: str,
    device_ids: Collection[str],
) -> dict[str, bytes]:
    """Return what members have sent in one step, by device.

    Args:
        session: Open session.
        training_session_id: Training session.
        round_number: Round.
        column: `advertisement`, `shares`, `confirmation`, `reveal` or `transcript`.
        device_ids: The members.
    """
    wanted = MEMBERS.c[column]
    query = select(MEMBERS.c.device_id, wanted).where(
        *_of_round(training_session_id, round_number),
        MEMBERS.c.device_id.in_(sorted(device_ids)),
        wanted.is_not(None),
    )
    return {row[0]: row[1] for row in session.execute(query)}


def update_member(
    session: Session,
    training_session_id: str,
    round_number: int,
    device_id: str,
    values: Mapping[str, Any],
) -> None:
    """Update columns of a member."""
    session.execute(
        update(MEMBERS)
        .where(*_of_round(training_session_id, round_number), MEMBERS.c.device_id == device_id)
        .values(**values)
    )


def update_digests(session: Session, training_session_id: str, round_number: int) -> dict[str, str]:
    """Return the digest of the statement of each device's update in a round."""
    query = select(UPDATES.c.device_id, UPDATES.c.statement_digest).where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
    )
    return {row[0]: row[1] for row in session.execute(query)}


def extend_steps(
    session: Session, training_session_id: str, round_number: int, until: datetime
) -> None:
    """Give the groups of a round time until then for the step that they wait for."""
    session.execute(
        update(GROUPS)
        .where(
            GROUPS.c.training_session_id == training_session_id,
            GROUPS.c.round_number == round_number,
            GROUPS.c.stage.not_in(sorted(ENDED)),
            GROUPS.c.deadline_at < until,
        )
        .values(deadline_at=until)
    )
    bump_rounds(session)


class GroupProgress(NamedTuple):
    """How far the groups of a round are: numbers of devices, and of groups by stage."""

    advertised_count: int
    sharer_count: int
    survivor_count: int
    groups: Mapping[str, int]


def progress_of(
    session: Session, training_session_id: str, round_numbers: Collection[int]
) -> dict[int, GroupProgress]:
    """Return how far the groups of rounds are, by round; without rounds in which no device has advertised."""
    wanted = sorted(round_numbers)
    of_members = select(
        MEMBERS.c.round_number,
        func.count(),
        func.sum(case((MEMBERS.c.is_sharer, 1), else_=0)),
        func.sum(case((and_(_IN_SUM, GROUPS.c.stage != GroupStage.ABORTED.value), 1), else_=0)),
    )
    of_members = of_members.select_from(MEMBERS.outerjoin(GROUPS, _IS_OF_GROUP)).where(
        MEMBERS.c.training_session_id == training_session_id,
        MEMBERS.c.round_number.in_(wanted),
    )
    of_groups = select(GROUPS.c.round_number, GROUPS.c.stage, func.count()).where(
        GROUPS.c.training_session_id == training_session_id, GROUPS.c.round_number.in_(wanted)
    )
    stages: dict[int, dict[str, int]] = {}
    for number, stage, count in session.execute(
        of_groups.group_by(GROUPS.c.round_number, GROUPS.c.stage)
    ):
        stages.setdefault(number, {})[stage] = count
    rows = session.execute(of_members.group_by(MEMBERS.c.round_number))
    return {row[0]: GroupProgress(row[1], row[2], row[3], stages.get(row[0], {})) for row in rows}


class EndedRound(NamedTuple):
    """A round that is over, of which what its members have sent is still stored."""

    number: int
    is_published: bool


def untrimmed_rounds(session: Session, training_session_id: str) -> Sequence[EndedRound]:
    """Return the rounds of a training session that are over, and not yet trimmed."""
    is_stored = exists().where(
        MEMBERS.c.training_session_id == ROUNDS.c.training_session_id,
        MEMBERS.c.round_number == ROUNDS.c.number,
        MEMBERS.c.advertisement.is_not(None),
    )
    query = (
        select(ROUNDS.c.number, ROUNDS.c.state == RoundState.PUBLISHED.value)
        .where(
            ROUNDS.c.training_session_id == training_session_id,
            ROUNDS.c.state.not_in([RoundState.OPEN.value, RoundState.CLOSED.value]),
            is_stored,
        )
        .order_by(ROUNDS.c.number)
    )
    return [EndedRound(*row) for row in session.execute(query)]


def trim_members(
    session: Session,
    training_session_id: str,
    round_number: int,
    transcripts: Mapping[str, bytes],
) -> None:
    """Delete what members have sent, but for the transcripts of some, by device."""
    of_round = (
        *_of_round(training_session_id, round_number),
        MEMBERS.c.advertisement.is_not(None),
    )
    for device_id, transcript in transcripts.items():
        session.execute(
            update(MEMBERS)
            .where(*of_round, MEMBERS.c.device_id == device_id)
            .values(transcript=transcript)
        )
    nothing = dict.fromkeys(("advertisement", "shares", "confirmation", "reveal"))
    session.execute(update(MEMBERS).where(*of_round).values(nothing))


def _of_round(training_session_id: str, round_number: int) -> tuple[Any, Any]:
    return (
        MEMBERS.c.training_session_id == training_session_id,
        MEMBERS.c.round_number == round_number,
    )
