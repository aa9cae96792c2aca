"""A training session's configuration is complete and consistent once it is stored."""

import math
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from qflare.crypto.signing import MAX_MESSAGE_BYTES
from qflare.v1 import security_pb2, training_pb2
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.training_configs import from_json, to_json
from qflare_server.training.config import (
    MAX_DEADLINE_S,
    MAX_SEED,
    complete,
    deadline_s,
)
from tests.support.use_cases import completed

Config = training_pb2.TrainingConfig
Rounds = training_pb2.RoundPolicy
Selection = training_pb2.SelectionPolicy
Transfer = training_pb2.TransferPolicy
Bound = training_pb2.MetricBound
Stop = training_pb2.EarlyStopPolicy
Evaluation = training_pb2.EvaluationPolicy
EVALUATED = Evaluation(every_rounds=1)


def test_nothing_stated_gets_every_default() -> None:
    done = completed(Config())

    assert (done.total_rounds, done.strategy.name) == (10, "fedavg")
    assert (done.rounds.quorum, done.rounds.target, deadline_s(done)) == (1, 1, 600.0)
    assert done.rounds.missed_quorum_action == training_pb2.MISSED_QUORUM_ACTION_EXTEND
    assert done.transfer.update_kind == training_pb2.UPDATE_KIND_WEIGHTS
    assert done.transfer.update_encoding == training_pb2.ENCODING_NONE
    assert done.transfer.retained_rounds == 1
    assert 1 <= done.selection.seed <= MAX_SEED


def test_what_is_stated_stays() -> None:
    stated = Config(
        total_rounds=3,
        rounds=Rounds(quorum=2, target=4, deadline=Duration(seconds=5, nanos=500_000_000)),
        selection=Selection(seed=7, fraction=0.5),
        strategy=training_pb2.StrategyConfig(name="median"),
    )

    done = completed(stated)

    assert (done.total_rounds, done.rounds.target, deadline_s(done)) == (3, 4, 5.5)
    assert (done.selection.seed, done.selection.fraction) == (7, 0.5)
    assert done.strategy.name == "median"


def test_what_was_given_is_not_changed() -> None:
    given_config = Config(rounds=Rounds(quorum=1))

    complete(given_config)

    assert given_config == Config(rounds=Rounds(quorum=1))


def test_target_is_the_quorum_unless_stated() -> None:
    assert completed(Config(rounds=Rounds(quorum=5))).rounds.target == 5


def test_neither_quorum_nor_size_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="how many updates make a version") as refused:
        complete(Config())
    assert refused.value.field == "config.rounds.quorum"


def test_a_share_of_the_devices_states_no_size() -> None:
    with pytest.raises(InvalidRequestError):
        complete(Config(selection=Selection(fraction=0.5)))


@given(st.integers(1, 10_000_000))
def test_a_stated_size_gives_a_majority(size: int) -> None:
    done = complete(Config(rounds=Rounds(device_count=size)))

    assert size < 2 * done.rounds.quorum <= size + 2
    assert done.rounds.target == done.rounds.quorum


@given(st.integers(1, 1000), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_selection_by_number_gives_a_majority_of_the_selected(count: int, over: float) -> None:
    policy = Selection(device_count=count, over_selection=over)
    done = complete(Config(selection=policy))

    assert done.rounds.quorum == math.ceil(count * (1 + over)) // 2 + 1


def test_a_quorum_of_more_than_take_part_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"at most rounds\.device_count 3") as refused:
        complete(Config(rounds=Rounds(quorum=4, device_count=3)))
    assert refused.value.field == "config.rounds.quorum"


def test_seed_is_drawn_anew_for_every_session() -> None:
    assert completed(Config()).selection.seed != completed(Config()).selection.seed


def rounds(**values: Any) -> Callable[[], Config]:
    return lambda: Config(rounds=Rounds(**values))


def selection(**values: Any) -> Callable[[], Config]:
    return lambda: Config(selection=Selection(**values))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Config(total_rounds=-1), "total_rounds"),
        (lambda: Config(total_rounds=1_000_001), "total_rounds"),
        (rounds(quorum=-1), "rounds.quorum"),
        (rounds(quorum=10_000_001), "rounds.quorum"),
        (rounds(quorum=5, target=4), "rounds.target"),
        (rounds(deadline=Duration()), "rounds.deadline"),
        (rounds(deadline=Duration(seconds=-1)), "rounds.deadline"),
        (rounds(deadline=Duration(seconds=MAX_DEADLINE_S + 1)), "rounds.deadline"),
        (rounds(max_staleness=-1), "rounds.max_staleness"),
        (selection(fraction=1.5), "selection.fraction"),
        (selection(fraction=-0.5), "selection.fraction"),
        (selection(fraction=math.nan), "selection.fraction"),
        (selection(device_count=-1), "selection.device_count"),
        (selection(over_selection=-1), "selection.over_selection"),
        (selection(seed=-1), "selection.seed"),
        (
            selection(capabilities=[training_pb2.CapabilityFilter(value=1)]),
            "selection.capabilities",
        ),
        (
            lambda: Config(transfer=Transfer(update_encoding=training_pb2.ENCODING_TOP_K)),
            "transfer.update_kind",
        ),
        (lambda: Config(transfer=Transfer(top_k_fraction=2)), "transfer.top_k_fraction"),
        *(
            (
                lambda number=number: Config(transfer=Transfer(download_encoding=number)),
                "transfer.download_encoding",
            )
            for number in (training_pb2.ENCODING_INT8, training_pb2.ENCODING_TOP_K, 99)
        ),
        (
            lambda: Config(
                transfer=Transfer(download_encoding=training_pb2.ENCODING_FLOAT16, sealed=True)
            ),
            "transfer.download_encoding",
        ),
        (lambda: Config(transfer=Transfer(retained_rounds=-1)), "transfer.retained_rounds"),
        (
            lambda: Config(safeguards=training_pb2.SafeguardPolicy(clip_norm=math.inf)),
            "safeguards.clip_norm",
        ),
        (
            lambda: Config(safeguards=training_pb2.SafeguardPolicy(min_cosine_similarity=2)),
            "safeguards.min_cosine_similarity",
        ),
        (
            lambda: Config(device_training=training_pb2.DeviceTraining(learning_rate=math.nan)),
            "device_training.learning_rate",
        ),
        (
            lambda: Config(device_training=training_pb2.DeviceTraining(labels={"a": "b" * 16_384})),
            "device_training.labels",
        ),
        (
            lambda: Config(
                device_training=training_pb2.DeviceTraining(
                    parameters={f"parameter {number}": 1.0 for number in range(1_000)}
                )
            ),
            "device_training.parameters",
        ),
    ],
)
def test_value_out_of_range_is_refused_by_name(make: Callable[[], Config], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        completed(make())

    assert caught.value.metadata == {"field": f"config.{field}"}


def test_parameter_of_the_device_s_training_that_is_not_finite_is_refused() -> None:
    settings = training_pb2.DeviceTraining(parameters={"mu": math.inf})

    with pytest.raises(InvalidRequestError, match="mu") as caught:
        completed(Config(device_training=settings))

    assert caught.value.metadata == {"field": "config.device_training.parameters[mu]"}


def test_largest_settings_fit_into_a_signed_task() -> None:
    settings = training_pb2.DeviceTraining(
        labels={"a": "b" * 16_000}, parameters={f"{number:0990}": 1.0 for number in range(16)}
    )
    done = completed(Config(device_training=settings))
    task = security_pb2.TaskStatement(
        realm="r" * 63,
        training_session_id=str(uuid.uuid4()),
        base_digest="0" * 64,
        task_nonce="0" * 64,
        config_digest="0" * 64,
        device_training=done.device_training,
        transfer=done.transfer,
    )

    assert task.ByteSize() < MAX_MESSAGE_BYTES // 2 + 4096


def test_top_k_gets_a_fraction() -> None:
    transfer = Transfer(
        update_kind=training_pb2.UPDATE_KIND_DELTA, update_encoding=training_pb2.ENCODING_TOP_K
    )

    assert completed(Config(transfer=transfer)).transfer.top_k_fraction == 0.1


@given(
    quorum=st.integers(1, 10**7),
    extra=st.integers(0, 5),
    seconds=st.integers(1, MAX_DEADLINE_S),
    seed=st.integers(1, MAX_SEED),
    fraction=st.floats(0, 1),
)
def test_stored_form_reads_back(
    quorum: int, extra: int, seconds: int, seed: int, fraction: float
) -> None:
    policy = Rounds(
        quorum=quorum,
        target=min(quorum + extra, 10**7),
        deadline=Duration(seconds=seconds),
    )
    config = completed(Config(rounds=policy, selection=Selection(seed=seed, fraction=fraction)))

    assert from_json(to_json(config)) == config


def test_completing_twice_changes_nothing() -> None:
    once = completed(Config())

    assert completed(once) == once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"release": {"bounds": [{"metric": "loss", "min_value": 2.0, "max_value": 1.0}]}},
            r"release.bounds\[0\]: got min_value 2 above max_value 1",
        ),
        ({"release": {"bounds": [{"metric": "a\nb", "min_value": 0.0}]}}, "printable"),
        ({"release": {"bounds": [{"metric": "x" * 101, "min_value": 0.0}]}}, "want 1 to 100"),
        ({"early_stop": {"metric": "a\x1b[2J", "patience_rounds": 3}}, "printable"),
        ({"evaluation": {"every_rounds": 1, "group_by": "a\nb"}}, "name of a device attribute"),
        ({"evaluation": {"every_rounds": 1, "group_by": "x" * 101}}, "at most 100"),
        ({"evaluation": {"group_by": "device_type"}}, "of which there are none"),
        ({"selection": {"device_count": 3}, "rounds": {"quorum": 4}}, "want at least the quorum 4"),
        (
            {"selection": {"capabilities": [{"capability": "ram", "value": float("nan")}]}},
            r"capabilities\[ram\]",
        ),
        ({"strategy": {"parameters": {"tau": float("inf")}}}, r"strategy.parameters\[tau\]"),
    ],
)
def test_contradictions_and_nonsense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        completed(Config(**changes))


def test_over_selection_counts_toward_the_quorum() -> None:
    selection = training_pb2.SelectionPolicy(device_count=3, over_selection=0.3)

    completed(Config(selection=selection, rounds=training_pb2.RoundPolicy(quorum=4)))


# Early stop, release and evaluation


@pytest.mark.parametrize(
    ("bound", "field"),
    [
        (Bound(min_value=1), "config.release.bounds[0].metric"),
        (Bound(metric="accuracy"), "config.release.bounds[0]"),
        (Bound(metric="accuracy", min_value=math.nan), "config.release.bounds[0].min_value"),
        (Bound(metric="accuracy", max_value=math.inf), "config.release.bounds[0].max_value"),
        (Bound(metric="train_accuracy", min_value=0.5), "config.release.bounds[0].metric"),
    ],
)
def test_a_gate_without_a_bound_is_refused(bound: Bound, field: str) -> None:
    config = Config(release=training_pb2.ReleasePolicy(bounds=[bound]))
    with pytest.raises(InvalidRequestError) as refused:
        completed(config)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Stop(target=0.9), "config.early_stop.metric"),
        (Stop(patience_rounds=3), "config.early_stop.metric"),
        (Stop(metric="accuracy", target=math.nan), "config.early_stop.target"),
        (Stop(metric="accuracy", patience_rounds=-1), "config.early_stop.patience_rounds"),
        (Stop(metric="train_loss", patience_rounds=1), "config.early_stop.metric"),
    ],
)
def test_an_early_stop_without_a_metric_is_refused(policy: Stop, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        completed(Config(early_stop=policy, evaluation=EVALUATED))
    assert refused.value.field == field


def test_an_early_stop_needs_evaluations() -> None:
    with pytest.raises(InvalidRequestError, match="federated evaluation"):
        completed(Config(early_stop=Stop(metric="accuracy", target=0.9)))


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Evaluation(quorum=-1), "quorum"),
        (Evaluation(max_example_count=-1), "max_example_count"),
        (Evaluation(max_example_count=2**41), "max_example_count"),
        (Evaluation(trim_fraction=0.5), "trim_fraction"),
        (Evaluation(trim_fraction=math.nan), "trim_fraction"),
        (Evaluation(trim_fraction=-0.1), "trim_fraction"),
        (Evaluation(trim_from_count=2), "trim_from_count"),
        (Evaluation(trim_from_count=-3), "trim_from_count"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(policy: Evaluation, field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        completed(Config(evaluation=policy))
    assert refused.value.field == f"config.evaluation.{field}"


def test_an_evaluation_has_defaults() -> None:
    rounds = training_pb2.RoundPolicy(quorum=7)
    done = completed(Config(rounds=rounds)).evaluation
    assert (done.quorum, done.trim_fraction, done.trim_from_count) == (7, 0.2, 5)
    off = completed(Config(evaluation=Evaluation(trim_fraction=0)))
    assert off.evaluation.trim_fraction == 0


def test_sensible_settings_are_kept() -> None:
    config = Config(
        early_stop=Stop(
            metric="loss", target=0.1, minimize=True, goal=training_pb2.METRIC_GOAL_MINIMIZE
        ),
        evaluation=EVALUATED,
        release=training_pb2.ReleasePolicy(bounds=[Bound(metric="loss", max_value=0.2)]),
    )
    done = completed(config)
    assert done.early_stop == config.early_stop
    assert done.release == config.release
