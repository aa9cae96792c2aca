"""Parameters of a strategy: none stands for a setting that has a field of its own, and none is without effect."""

from dataclasses import fields

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import StrategyRefusedError
from qflare_server.strategies import PrivacyConfig, StrategyConfig
from qflare_server.strategies.catalogue import RULES
from qflare_server.training.rhythm import ASYNCHRONOUS
from qflare_server.training.strategy import build_strategy

PLACES = {
    "clip_norm": "safeguards.clip_norm",
    "max_norm": "safeguards.max_norm",
    "min_cosine": "safeguards.min_cosine_similarity",
    "max_staleness": "rounds.max_staleness",
}
PROTOS = (
    training_pb2.SafeguardPolicy,
    training_pb2.RoundPolicy,
    training_pb2.PrivacyPolicy,
    training_pb2.TransferPolicy,
    training_pb2.StrategyConfig,
    training_pb2.TrainingConfig,
)
OPTIMIZERS = {"momentum", "beta1", "beta2", "tau", "initial_second_moment", "bias_correction"}
OF_ANY_RULE = {"server_learning_rate", "proximal_mu"}
OF_RULES = {
    "byzantine_count",
    "control_share",
    "selected_count",
    "trimmed_fraction",
    "smoothing",
    "max_iterations",
}


def session_of(rule: str, parameters: dict[str, float]) -> training_pb2.TrainingConfig:
    """Return a valid configuration of a rule, but for the parameters."""
    config = training_pb2.TrainingConfig(total_rounds=1)
    config.strategy.name = rule
    config.rounds.quorum = 9
    if rule == "fedprox":
        config.strategy.parameters["proximal_mu"] = 0.1
    if rule in ASYNCHRONOUS:
        config.rounds.max_staleness = 2
    config.strategy.parameters.update(parameters)
    return config


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "place"), PLACES.items())
@pytest.mark.parametrize("value", [0.0, 0.5, 1e9])
def test_a_setting_with_a_field_of_its_own_is_no_parameter(
    rule: str, name: str, place: str, value: float
) -> None:
    """Otherwise one of two values would be in effect, and nothing would say which."""
    with pytest.raises(StrategyRefusedError, match=f"{name}: set {place}, not a parameter"):
        build_strategy(session_of(rule, {name: value}))


@pytest.mark.parametrize("rule", RULES)
def test_every_name_of_another_setting_is_refused(rule: str) -> None:
    """Names of all fields of all policies, and of everything that a strategy is built from."""
    names = {field.name for proto in PROTOS for field in proto.DESCRIPTOR.fields}
    names |= {item.name for kind in (StrategyConfig, PrivacyConfig) for item in fields(kind)}
    for name in sorted(names - OF_ANY_RULE - OF_RULES - OPTIMIZERS):
        with pytest.raises(StrategyRefusedError):
            build_strategy(session_of(rule, {name: 1.0}))


@pytest.mark.parametrize("name", sorted(OF_RULES | OPTIMIZERS))
def test_a_parameter_that_a_private_mean_does_not_use_is_refused(name: str) -> None:
    config = session_of("fedavg", {name: 1.0})
    config.privacy.noise_multiplier = 1.0
    config.privacy.clip_norm = 1.0
    config.privacy.epsilon_budget = 10.0
    config.privacy.delta = 1e-5

    with pytest.raises(StrategyRefusedError):
        build_strategy(config)
