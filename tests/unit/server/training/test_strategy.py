"""From the configuration of a training session to its strategy, and to what devices are told."""

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import StrategyRefusedError
from qflare_server.strategies.server_optimizers import MomentumStep
from qflare_server.training.strategy import (
    add_device_settings,
    build_strategy,
    privacy_config,
    stored_strategy,
    warnings_of,
)
from tests.support.use_cases import completed


def config(name: str, **parameters: float) -> training_pb2.TrainingConfig:
    strategy = training_pb2.StrategyConfig(name=name, parameters=parameters)
    return completed(training_pb2.TrainingConfig(strategy=strategy))


def test_devices_are_told_the_proximal_term() -> None:
    prox = config("fedprox", proximal_mu=0.25)

    add_device_settings(prox, build_strategy(prox))

    assert dict(prox.device_training.parameters) == {"proximal_mu": 0.25}


def test_devices_are_not_told_two_proximal_terms() -> None:
    prox = config("fedprox", proximal_mu=0.25)
    prox.device_training.parameters["proximal_mu"] = 0.5

    with pytest.raises(StrategyRefusedError, match=r"strategy says 0.25, device_training 0.5"):
        add_device_settings(prox, build_strategy(prox))


def test_other_settings_of_the_devices_stay() -> None:
    plain = config("fedavg")
    plain.device_training.parameters["temperature"] = 2.0

    add_device_settings(plain, build_strategy(plain))

    assert dict(plain.device_training.parameters) == {"temperature": 2.0}


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(StrategyRefusedError, match="unknown parameters of fedavg: momentun"):
        build_strategy(config("fedavg", momentun=0.9))


def test_whole_numbers_are_asked_for_where_they_are_needed() -> None:
    with pytest.raises(StrategyRefusedError, match="want a whole number"):
        build_strategy(config("krum", byzantine_count=0.5))


def private(accountant: int) -> training_pb2.TrainingConfig:
    privacy = training_pb2.PrivacyPolicy(
        noise_multiplier=2.0,
        clip_norm=1.0,
        epsilon_budget=8.0,
        delta=1e-5,
        accountant=accountant,  # type: ignore[arg-type]  # numbers that no name has, too
    )
    return completed(training_pb2.TrainingConfig(privacy=privacy))


@pytest.mark.parametrize(("number", "name"), [(0, "rdp"), (1, "rdp"), (2, "pld")])
def test_the_accountant_is_chosen(number: int, name: str) -> None:
    chosen = privacy_config(private(number))

    assert chosen is not None
    assert chosen.accountant == name


def test_unknown_accountants_are_refused() -> None:
    with pytest.raises(StrategyRefusedError, match=r"accountant: got number 7, want PRIVACY_ACC"):
        build_strategy(private(7))


def test_any_rule_may_step_with_momentum() -> None:
    chosen = config("median", momentum=0.8)
    chosen.strategy.optimizer = "momentum"

    assert build_strategy(chosen).optimizer == MomentumStep(learning_rate=1.0, momentum=0.8)


def test_unknown_optimizers_are_refused() -> None:
    chosen = config("fedavg")
    chosen.strategy.optimizer = "newton"

    with pytest.raises(StrategyRefusedError, match="unknown optimizer 'newton'"):
        build_strategy(chosen)


@pytest.mark.parametrize(
    ("name", "optimizer", "parameters"),
    [
        ("fedavg", "", {"byzantine_count": 2}),
        ("fedavg", "", {"byzantine_count": 0}),
        ("fedavg", "", {"momentum": 0.9}),
        ("fedavg", "momentum", {"beta1": 0.9}),
        ("fedadam", "", {"trimmed_fraction": 0.2}),
        ("fedadagrad", "", {"beta2": 0.9}),
        ("fedyogi", "", {"bias_correction": 1}),
        ("median", "", {"trimmed_fraction": 0.2}),
        ("krum", "", {"selected_count": 1}),
        ("trimmed_mean", "", {"max_iterations": 3}),
    ],
)
def test_parameters_without_effect_are_refused(
    name: str, optimizer: str, parameters: dict[str, float]
) -> None:
    chosen = config(name, **parameters)
    chosen.strategy.optimizer = optimizer
    chosen.rounds.quorum = chosen.rounds.target = 20

    with pytest.raises(
        StrategyRefusedError, match=f"{name} with .* does not use {next(iter(parameters))}"
    ):
        build_strategy(chosen)
    assert stored_strategy(chosen).name == name  # one that an earlier release has created goes on


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("clip_norm", "safeguards.clip_norm"),
        ("max_norm", "safeguards.max_norm"),
        ("min_cosine", "safeguards.min_cosine_similarity"),
    ],
)
def test_a_setting_has_one_place(parameter: str, place: str) -> None:
    chosen = config("fedavg", **{parameter: 0.5})
    chosen.safeguards.clip_norm = 1.0

    with pytest.raises(StrategyRefusedError, match=f"{parameter}: set {place}"):
        build_strategy(chosen)


def test_staleness_has_one_place() -> None:
    with pytest.raises(StrategyRefusedError, match=r"max_staleness: set rounds\.max_staleness"):
        build_strategy(config("fedbuff", max_staleness=3))


@pytest.mark.parametrize(
    ("safeguards", "name"),
    [({"max_norm": 3.0}, "max_norm"), ({"min_cosine_similarity": 0.0}, "min_cosine")],
)
def test_privacy_refuses_what_refuses_single_updates(
    safeguards: dict[str, float], name: str
) -> None:
    chosen = private(0)
    chosen.safeguards.MergeFrom(training_pb2.SafeguardPolicy(**safeguards))  # type: ignore[arg-type]

    with pytest.raises(StrategyRefusedError, match=f"{name} refuses single updates"):
        build_strategy(chosen)
    assert stored_strategy(chosen).privacy is not None


@pytest.mark.parametrize(
    ("name", "parameters", "quorum", "warning"),
    [
        ("trimmed_mean", {}, 9, "trims nothing of fewer than 10 updates, and rounds close from 9"),
        ("trimmed_mean", {}, 10, ""),
        ("trimmed_mean", {"trimmed_fraction": 0.0}, 50, "trims nothing: raise trimmed_fraction"),
        ("trimmed_mean", {"trimmed_fraction": 0.25}, 4, ""),
        ("median", {}, 2, "of one or two updates is their mean"),
        ("median", {}, 3, ""),
        ("geometric_median", {}, 2, "of one or two updates is their mean"),
        ("bulyan", {}, 5, "averages every update"),
        ("bulyan", {"byzantine_count": 1}, 7, ""),
        ("multi_krum", {"selected_count": 5}, 5, "selects all"),
        ("multi_krum", {}, 5, ""),
        ("fedavg", {}, 1, ""),
    ],
)
def test_a_rule_without_effect_at_the_quorum_warns(
    name: str, parameters: dict[str, float], quorum: int, warning: str
) -> None:
    chosen = config(name, **parameters)
    chosen.rounds.quorum = chosen.rounds.target = quorum
    build_strategy(chosen)

    found = warnings_of(chosen)

    assert len(found) == bool(warning)
    assert warning in "".join(found)
