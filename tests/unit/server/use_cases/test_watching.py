"""What a watcher is told follows from two looks."""

from datetime import UTC, datetime

import pytest

from qflare.v1 import training_pb2
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository.views import VersionFacts
from qflare_server.use_cases.training_sessions.watching import Change, Kind, View, changes

AT = datetime(2030, 1, 1, tzinfo=UTC)


def view(
    *rounds: Round, state: str = "running", versions: dict[int, VersionFacts] | None = None
) -> View:
    training_session = TrainingSession(
        id="s",
        name="",
        model_type="",
        architecture={},
        state=state,
        state_reason="",
        config=training_pb2.TrainingConfig(),
        current_round=len(rounds),
        current_version=0,
        best_value=None,
        best_version=None,
        released_version=None,
        epsilon_spent=None,
        privacy_state=None,
        created_at=AT,
        started_at=AT,
        ended_at=None,
    )
    return View(training_session, {item.number: item for item in rounds}, versions or {})


def a_round(
    number: int, state: str = "open", accepted: int = 0, version: int | None = None
) -> Round:
    return Round(
        training_session_id="s",
        number=number,
        state=state,
        state_reason="",
        base_version=0,
        version=version,
        quorum=1,
        target=1,
        selected_count=0,
        accepted_count=accepted,
        rejected_count=0,
        late_count=0,
        failed_count=0,
        example_count=0,
        nonce="",
        task=None,
        opened_at=AT,
        deadline_at=AT,
        closed_at=None,
        published_at=None,
        pruned_at=None,
    )


def test_nothing_happens_between_equal_looks() -> None:
    assert list(changes(view(a_round(1, accepted=2)), view(a_round(1, accepted=2)))) == []


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ([], [a_round(1)], [Kind.ROUND_OPENED]),
        ([a_round(1)], [a_round(1, accepted=3)], [Kind.ROUND_PROGRESSED]),
        (
            [a_round(1)],
            [a_round(1, "closed", 3)],
            [Kind.ROUND_PROGRESSED, Kind.ROUND_CLOSED],
        ),
        ([a_round(1, "closed", 3)], [a_round(1, "published", 3, 1)], [Kind.VERSION_PUBLISHED]),
        (
            [a_round(1, "open", 3)],
            [a_round(1, "published", 3, 1), a_round(2)],
            [Kind.ROUND_CLOSED, Kind.VERSION_PUBLISHED, Kind.ROUND_OPENED],
        ),
        ([a_round(1, "open", 1)], [a_round(1, "failed", 1)], [Kind.ROUND_FAILED]),
        ([a_round(1, "open")], [a_round(1, "cancelled")], [Kind.ROUND_FAILED]),
    ],
)
def test_rounds_tell_their_life(before: list[Round], after: list[Round], kinds: list[Kind]) -> None:
    assert [change.kind for change in changes(view(*before), view(*after))] == kinds


def test_a_whole_round_between_two_looks_is_told_in_order() -> None:
    seen = list(changes(view(), view(a_round(1, "published", 2, 1))))
    assert seen == [
        Change(Kind.ROUND_OPENED, 1),
        Change(Kind.ROUND_PROGRESSED, 1),
        Change(Kind.ROUND_CLOSED, 1),
        Change(Kind.VERSION_PUBLISHED, 1, 1),
    ]


def test_a_rollback_is_a_version_without_a_round() -> None:
    facts = VersionFacts(0, False, {})
    assert list(changes(view(), view(versions={3: facts}))) == [
        Change(Kind.VERSION_PUBLISHED, version=3)
    ]


def test_further_metrics_change_a_version() -> None:
    before = view(versions={1: VersionFacts(1, False, {})})
    after = view(versions={1: VersionFacts(1, False, {"accuracy": 0.5})})
    assert list(changes(before, after)) == [Change(Kind.VERSION_CHANGED, version=1)]


def test_a_changed_state_comes_last() -> None:
    before = view(a_round(1, "closed"))
    after = view(a_round(1, "published", version=1), state="completed")
    assert [change.kind for change in changes(before, after)] == [
        Kind.VERSION_PUBLISHED,
        Kind.STATE_CHANGED,
    ]
