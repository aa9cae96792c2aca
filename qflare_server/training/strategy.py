"""Builds a training session's strategy from its configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import ceil
from typing import Any, Final

from qflare.masking.noise import DEVICES, MAX_ELEMENTS
from qflare.v1 import training_pb2
from qflare_server.errors import StrategyRefusedError
from qflare_server.strategies import (
    PrivacyConfig,
    Strategy,
    StrategyConfig,
    StrategyConfigError,
    build,
)
from qflare_server.strategies.catalogue import RULES, rebuild
from qflare_server.strategies.config import NoiseShares
from qflare_server.strategies.validation import ineffective
from qflare_server.training.masking import (
    group_quorum,
    has_noise_in_sum,
    is_masked,
    parameters_of,
)
from qflare_server.training.rhythm import is_asynchronous

_DERIVED: Final = frozenset(
    {
        "name",
        "quorum",
        "asynchronous",
        "secure_aggregation",
        "group_quorum",
        "privacy",
        "options",
        "weighting",
        "optimizer",
    }
)
_PARAMETERS: Final = {
    item.name: type(item.default) for item in fields(StrategyConfig) if item.name not in _DERIVED
}


_PLACES: Final = {
    "clip_norm": "safeguards.clip_norm",
    "max_norm": "safeguards.max_norm",
    "min_cosine": "safeguards.min_cosine_similarity",
    "max_staleness": "rounds.max_staleness",
}
"""Settings that have a field of their own."""


def build_strategy(config: training_pb2.TrainingConfig) -> Strategy:
    """Build the strategy of a new training session.

    Raises:
        StrategyRefusedError: Something is unknown, out of range, contradictory or without effect; the message is the
            reason.
    """
    try:
        _check_places(config.strategy.parameters)
        return build(_strategy_config(config), [*config.strategy.parameters])
    except StrategyConfigError as error:
        raise StrategyRefusedError(str(error), field="config.strategy") from error


def _check_places(parameters: Mapping[str, float]) -> None:
    for name, place in _PLACES.items():
        if name in parameters:
            raise StrategyConfigError(f"{name}: set {place}, not a parameter of the strategy")


def stored_strategy(config: training_pb2.TrainingConfig) -> Strategy:
    """Build the strategy of a stored training session, tolerating settings that earlier releases accepted.

    Raises:
        StrategyRefusedError: Something is unknown, out of range or contradictory; the message is the reason.
    """
    try:
        return rebuild(_strategy_config(config))
    except StrategyConfigError as error:
        raise StrategyRefusedError(str(error), field="config.strategy") from error


def warnings_of(config: training_pb2.TrainingConfig) -> list[str]:
    """Return warnings about a valid configuration, one sentence each."""
    try:
        reason = ineffective(_strategy_config(config))
    except StrategyConfigError:
        reason = ""
    return [*([reason] if reason else []), *idle_settings(config)]


def idle_settings(config: training_pb2.TrainingConfig) -> Iterator[str]:
    """Yield settings outside the strategy that have no effect, or not the intended one."""
    selected = ceil(config.selection.device_count * (1 + config.selection.over_selection))
    most = min(filter(None, (selected, config.rounds.device_count)), default=0)
    if most and config.rounds.target > most:
        yield (
            f"rounds.target {config.rounds.target} is above the {most} devices that take part: every round lasts "
            "until its deadline"
        )
    if config.release.bounds and not config.evaluation.every_rounds:
        yield (
            "release.bounds go by federated evaluation, which evaluation.every_rounds turns on: only an administrator "
            "releases versions"
        )
    if config.evaluation.every_rounds > config.total_rounds:
        yield (
            f"evaluation.every_rounds {config.evaluation.every_rounds} is above total_rounds {config.total_rounds}: no "
            "version is evaluated"
        )
    if config.early_stop.patience_rounds > config.total_rounds:
        yield (
            f"early_stop.patience_rounds {config.early_stop.patience_rounds} is above total_rounds "
            f"{config.total_rounds}: training never stops early for want of improvement"
        )
    safeguards = config.safeguards
    if 0 < safeguards.max_norm <= safeguards.clip_norm:
        yield (
            f"safeguards.clip_norm {safeguards.clip_norm:g} is not below max_norm {safeguards.max_norm:g}: an update "
            "that would be clipped is rejected"
        )


def _strategy_config(config: training_pb2.TrainingConfig) -> StrategyConfig:
    """Return the strategy settings of a training session; parameters override fields, as in earlier releases."""
    chosen = config.strategy
    safeguards = config.safeguards
    known, options = _split(chosen.parameters)
    if options and chosen.name in RULES:
        raise StrategyConfigError(
            f"unknown parameters of {chosen.name}: {', '.join(sorted(options))}"
        )
    values: dict[str, Any] = {
        "clip_norm": safeguards.clip_norm,
        "max_norm": safeguards.max_norm,
        "max_staleness": config.rounds.max_staleness,
    }
    if safeguards.HasField("min_cosine_similarity"):
        values["min_cosine"] = safeguards.min_cosine_similarity
    return StrategyConfig(
        name=chosen.name,
        quorum=config.rounds.quorum,
        optimizer=chosen.optimizer,
        weighting="uniform" if chosen.uniform_weights else "",
        asynchronous=is_asynchronous(config),
        secure_aggregation=is_masked(config),
        group_quorum=group_quorum(config),
        privacy=privacy_config(config),
        options=options,
        **{**values, **known},
    )


def _split(parameters: Mapping[str, float]) -> tuple[dict[str, Any], dict[str, float]]:
    """Split parameters into common ones and those of a custom strategy."""
    known: dict[str, Any] = {}
    options: dict[str, float] = {}
    for name, value in parameters.items():
        kind = _PARAMETERS.get(name)
        if kind is None or kind is str:
            options[name] = value
        elif kind is float:
            known[name] = value
        elif value == int(value):
            known[name] = bool(value) if kind is bool else int(value)
        else:
            raise StrategyConfigError(f"{name}: got {value:g}, want a whole number")
    return known, options


def privacy_config(config: training_pb2.TrainingConfig) -> PrivacyConfig | None:
    """Return the central-privacy settings of a training session, None if it has none.

    The fixed denominator of the mean is the number of updates at which a round closes. Under secure aggregation an
    element of an update is off by at most one level of quantization, which the noise covers too.

    Raises:
        StrategyConfigError: Privacy is asked for without noise.
    """
    policy = config.privacy
    if not policy.noise_multiplier:
        if policy != training_pb2.PrivacyPolicy():
            raise StrategyConfigError("privacy without noise is none: set privacy.noise_multiplier")
        return None
    return PrivacyConfig(
        clip_norm=policy.clip_norm,
        noise_multiplier=policy.noise_multiplier,
        epsilon_budget=policy.epsilon_budget,
        delta=policy.delta,
        expected_update_count=config.rounds.target,
        adaptive_quantile=policy.target_quantile,
        accountant=_accountant(policy),
        rounding=1 / parameters_of(config).scale if is_masked(config) else 0.0,
        shares=_shares(config),
    )


def _shares(config: training_pb2.TrainingConfig) -> NoiseShares | None:
    """Return the noise that is in the sum when the coordinator gets it; None if the coordinator adds the noise."""
    if not has_noise_in_sum(config):
        return None
    parameters = parameters_of(config)
    is_of_devices = config.secure_aggregation.noise == DEVICES
    return NoiseShares(
        count=config.secure_aggregation.min_cohort if is_of_devices else 1,
        stddev=parameters.noise_stddev(0),
        element_count=MAX_ELEMENTS,
    )


def _accountant(policy: training_pb2.PrivacyPolicy) -> str:
    """Return the accountant's name in `strategies.accounting`."""
    number = policy.accountant or training_pb2.PRIVACY_ACCOUNTANT_RDP
    try:
        name = training_pb2.PrivacyAccountant.Name(number)
    except ValueError:
        raise StrategyConfigError(
            f"privacy.accountant: got number {number}, want PRIVACY_ACCOUNTANT_RDP or PRIVACY_ACCOUNTANT_PLD"
        ) from None
    return name.removeprefix("PRIVACY_ACCOUNTANT_").lower()


def add_device_settings(config: training_pb2.TrainingConfig, strategy: Strategy) -> None:
    """Add a strategy's device settings, such as `proximal_mu`, to the tasks' training settings.

    Raises:
        StrategyRefusedError: The training settings contradict the strategy's.
    """
    parameters = config.device_training.parameters
    for name, value in strategy.device_settings.items():
        if parameters.get(name, value) != value:
            raise StrategyRefusedError(
                f"{name}: strategy says {value:g}, device_training {parameters[name]:g}",
                field="config.device_training.parameters",
            )
        parameters[name] = value
