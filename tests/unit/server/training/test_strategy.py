"""From the configuration of a training session to its strategy, and to what devices are told."""

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import StrategyRefusedError
from qflare_server.strategies.server_optimizers import MomentumStep
from qflare_server.training.config import complete
from qflare_server.training.strategy import add_device_settings, build_strategy, privacy_config


def config(name: str, **parameters: float) -> training_pb2.TrainingConfig:
    strategy = training_pb2.StrategyConfig(name=name, parameters=parameters)
    return complete(training_pb2.TrainingConfig(strategy=strategy))


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
    return complete(training_pb2.TrainingConfig(privacy=privacy))


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
