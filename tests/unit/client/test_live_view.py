"""The bar of a round under way."""

import pytest

from qflare.v1 import training_pb2
from qflare_client.admin.live import bar


def drawn(columns: int, accepted_count: int = 37, number: int = 118) -> str:
    config = training_pb2.TrainingConfig(total_rounds=120)
    config.rounds.quorum = 50
    session = training_pb2.TrainingSession(config=config)
    session.best.metric, session.best.value = "accuracy", 0.98765
    session.best.source = training_pb2.METRIC_SOURCE_TRAINING
    current = training_pb2.Round(
        round_number=number,
        accepted_count=accepted_count,
        state=training_pb2.ROUND_STATE_OPEN,
    )
    return bar(session, current, columns)


@pytest.mark.parametrize("columns", [20, 40, 70, 80, 81, 200])
def test_a_bar_leaves_the_last_column_free(columns: int) -> None:
    assert len(drawn(columns)) < columns


def test_a_wide_terminal_shows_everything() -> None:
    assert drawn(200) == (
        "round  118/120  [#################.......] 37/50 updates  open  best accuracy 0.9877 (training data only)"
    )


def test_rounds_that_made_no_version_lengthen_the_session() -> None:
    assert drawn(200, number=123).startswith("round  123/123  [")


def test_a_narrow_terminal_gets_a_shorter_bar() -> None:
    assert drawn(97) == (
        "round  118/120  [###########....] 37/50 updates  open  best accuracy 0.9877 (training data only)"
    )


def test_more_updates_than_the_target_fill_the_bar() -> None:
    assert "[########################] 60/50" in drawn(200, 60)
