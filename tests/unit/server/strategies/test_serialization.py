import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.strategies import (
    Outcome,
    OutcomeEncoder,
    UpdateAssessment,
    begin,
    build,
    by_update,
    outcome_from_data,
    outcome_to_data,
)
from qflare_server.strategies import StrategyConfig as Config
from qflare_server.strategies.testkit import RunOptions, make_version, reader_of, sample

OUTCOME = Outcome(
    strategy="fedavg",
    judgements=(
        UpdateAssessment("a", factor=0.1, coefficient=3.0, weight=3.0, norm=1 / 3, cosine=-0.5),
        UpdateAssessment(
            "b", factor=0.0, coefficient=0.0, weight=0.0, rejection="too long", norm=math.inf
        ),
    ),
    weight_sum=3.0,
    scalars={"clip_bound": 0.1 + 0.2},
    clipped_fraction=1.0,
    noise_stddev=1e-300,
)


def test_an_outcome_survives_json() -> None:
    assert outcome_from_data(json.loads(json.dumps(outcome_to_data(OUTCOME)))) == OUTCOME


def test_an_unknown_norm_becomes_null() -> None:
    outcome = Outcome("fedavg", (UpdateAssessment("a", 1.0, 1.0, 1.0),), 1.0)

    data = outcome_to_data(outcome)

    assert data["judgements"][0]["norm"] is None
    assert math.isnan(outcome_from_data(data).judgements[0].norm)


NUMBERS = st.floats()
JUDGEMENTS = st.builds(
    UpdateAssessment,
    update_id=st.text(max_size=4),
    factor=NUMBERS,
    coefficient=NUMBERS,
    weight=NUMBERS,
    rejection=st.text(max_size=9),
    norm=NUMBERS,
    cosine=st.none() | NUMBERS,
)


@given(
    judgements=st.lists(JUDGEMENTS, max_size=5),
    others=st.lists(JUDGEMENTS, max_size=3),
    prepared=st.integers(0, 5),
    strategy=st.text(max_size=9) | st.just('"judgements": []'),
    scalars=st.dictionaries(st.text(max_size=9) | st.just('"judgements": []'), NUMBERS, max_size=2),
    number=NUMBERS,
)
def test_what_was_encoded_beforehand_does_not_change_the_bytes(
    judgements: list[UpdateAssessment],
    others: list[UpdateAssessment],
    prepared: int,
    strategy: str,
    scalars: dict[str, float],
    number: float,
) -> None:
    outcome = Outcome(strategy, tuple(judgements), number, scalars, number, number)
    encoder = OutcomeEncoder()
    encoder.prepare([*judgements[:prepared], *others])

    encoded = encoder.encode(outcome)

    assert encoded == json.dumps(outcome_to_data(outcome), sort_keys=True).encode()


@pytest.mark.parametrize(
    "change", [{"judgements": None}, {"scalars": 3}, {"weight_sum": "x"}, {"judgements": [{}]}]
)
def test_other_data_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not the record|could not convert"):
        outcome_from_data({**outcome_to_data(OUTCOME), **change})


@pytest.mark.parametrize("name", ["fedavg", "bulyan", "geometric_median"])
def test_a_version_is_recomputed_without_judging_again(name: str) -> None:
    data = sample(update_count=7, element_count=300)
    hostile = 1 if name == "bulyan" else 0
    strategy = build(Config(name=name, quorum=7, clip_norm=0.9, byzantine_count=hostile))
    made = make_version(strategy, data.base, data.contributions())

    again = make_version(
        strategy, data.base, data.contributions(), RunOptions(recorded=by_update(made.outcome))
    )

    assert again.weights.tobytes() == made.weights.tobytes()
    assert again.outcome == made.outcome


@pytest.mark.parametrize("name", ["fedavg", "median"])
def test_a_record_of_other_updates_is_refused(name: str) -> None:
    data = sample(update_count=1, element_count=3)
    aggregation = begin(build(Config(name=name)), 3, reader_of(data.base), recorded={})

    with pytest.raises(ValueError, match="no judgement of update update-000"):
        _ = [aggregation.add(update) for update in data.contributions()], aggregation.outcome
