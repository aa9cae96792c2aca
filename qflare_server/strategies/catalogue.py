"""Strategy factory: built-in rules and optimizers by name, and the start of an aggregation.

`build` rejects contradictory settings instead of repairing them, because a training session created with one would fail
only rounds later. `rebuild` does the same for stored sessions, with the checks of the release that created them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Final

from qflare_server.strategies.accumulator import Accumulator, SpareTotal
from qflare_server.strategies.cohort import DEFAULT_BUDGET_BYTES, CohortAggregation
from qflare_server.strategies.config import StrategyConfig
from qflare_server.strategies.errors import StrategyConfigError
from qflare_server.strategies.fedavg import BufferedMean, StalenessBound, WeightedMean, Weighting
from qflare_server.strategies.geometric_median import GeometricMedian
from qflare_server.strategies.interfaces import Screen, ServerOptimizer
from qflare_server.strategies.krum import Bulyan, Krum
from qflare_server.strategies.median import CoordinateMedian, TrimmedMean
from qflare_server.strategies.plugins import Rule, RuleFactory, installed_names, load_rule
from qflare_server.strategies.privacy import (
    AdaptiveBound,
    CentralPrivacy,
    heuristic_count_stddev,
)
from qflare_server.strategies.screening import DirectionBound, NormBound, NormClip
from qflare_server.strategies.server_optimizers import (
    AdagradStep,
    AdamStep,
    MomentumStep,
    PlainStep,
    YogiStep,
)
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.types import REVISION, PassRunner, Prior, Reader, UpdateAssessment
from qflare_server.strategies.validation import (
    check_bounds,
    check_combination,
    check_new,
    check_ranges,
)


def _mean(config: StrategyConfig) -> Rule:
    usual: Weighting = "uniform" if config.privacy else "examples"
    return WeightedMean(_weighting(config, usual))


def _controlled(config: StrategyConfig) -> Rule:
    return WeightedMean(_weighting(config, "uniform"))


def _device_settings(config: StrategyConfig) -> dict[str, float]:
    """Return the numbers that devices are told with their tasks."""
    settings = {"proximal_mu": config.proximal_mu} if config.proximal_mu else {}
    return (
        {**settings, "control_share": config.control_share}
        if config.name == "scaffold"
        else settings
    )


def _buffered(config: StrategyConfig) -> Rule:
    return BufferedMean(_weighting(config, "uniform"))


def _geometric(config: StrategyConfig) -> Rule:
    return GeometricMedian(
        smoothing=config.smoothing,
        max_iterations=config.max_iterations,
        by_examples=_weighting(config, "uniform") == "examples",
    )


def _weighting(config: StrategyConfig, usual: Weighting) -> Weighting:
    match config.weighting:
        case "":
            return usual
        case "examples":
            return "examples"
        case "uniform":
            return "uniform"
        case other:
            raise StrategyConfigError(f"weighting must be examples or uniform, got {other!r}")


RULES: Final[Mapping[str, RuleFactory]] = {
    "fedavg": _mean,
    "fedprox": _mean,
    "scaffold": _controlled,
    "fedavgm": _mean,
    "fedadam": _mean,
    "fedyogi": _mean,
    "fedadagrad": _mean,
    "fedbuff": _buffered,
    "median": lambda _: CoordinateMedian(),
    "trimmed_mean": lambda config: TrimmedMean(config.trimmed_fraction),
    "krum": lambda config: Krum(config.byzantine_count),
    "multi_krum": lambda config: Krum(config.byzantine_count, config.selected_count),
    "bulyan": lambda config: Bulyan(config.byzantine_count),
    "geometric_median": _geometric,
}
"""Built-in rules by name."""

_NAMED_OPTIMIZERS: Final = {
    "fedavgm": "momentum",
    "fedadam": "adam",
    "fedyogi": "yogi",
    "fedadagrad": "adagrad",
}


def _optimizer_name(config: StrategyConfig) -> str:
    """Choose the server optimizer: the one that the name implies, or the configured one."""
    named = _NAMED_OPTIMIZERS.get(config.name, "")
    if named and config.optimizer and config.optimizer != named:
        raise StrategyConfigError(
            f"{config.name} steps by {named}; it contradicts optimizer {config.optimizer!r}"
        )
    chosen = named or config.optimizer or "plain"
    if chosen not in _OPTIMIZERS:
        raise StrategyConfigError(f"unknown optimizer {chosen!r}; known: {', '.join(_OPTIMIZERS)}")
    return chosen


def _plain(config: StrategyConfig) -> ServerOptimizer:
    return PlainStep(learning_rate=config.server_learning_rate or 1.0)


def _momentum(config: StrategyConfig) -> ServerOptimizer:
    return MomentumStep(learning_rate=config.server_learning_rate or 1.0, momentum=config.momentum)


def _second_moment(config: StrategyConfig) -> float:
    """Return the first value of `v`: the configured one, or the paper's tau squared."""
    return config.tau**2 if config.initial_second_moment < 0 else config.initial_second_moment


def _adam(config: StrategyConfig) -> ServerOptimizer:
    return AdamStep(
        learning_rate=config.server_learning_rate or 0.1,
        beta1=config.beta1,
        beta2=config.beta2,
        tau=config.tau,
        initial_second_moment=_second_moment(config),
        bias_correction=config.bias_correction,
    )


def _yogi(config: StrategyConfig) -> ServerOptimizer:
    return YogiStep(
        learning_rate=config.server_learning_rate or 0.1,
        beta1=config.beta1,
        beta2=config.beta2,
        tau=config.tau,
        initial_second_moment=_second_moment(config),
    )


def _adagrad(config: StrategyConfig) -> ServerOptimizer:
    return AdagradStep(
        learning_rate=config.server_learning_rate or 0.1,
        beta1=config.beta1,
        tau=config.tau,
        initial_second_moment=_second_moment(config),
    )


_OPTIMIZERS: Final[Mapping[str, Callable[[StrategyConfig], ServerOptimizer]]] = {
    "plain": _plain,
    "momentum": _momentum,
    "adam": _adam,
    "yogi": _yogi,
    "adagrad": _adagrad,
}


def _screens(config: StrategyConfig) -> tuple[Screen, ...]:
    """Return the screens: refusals first, clipping last, so that bounds apply to the unclipped delta."""
    screens: list[Screen] = []
    if config.asynchronous:
        screens.append(StalenessBound(config.max_staleness))
    if config.max_norm:
        screens.append(NormBound(config.max_norm))
    if config.min_cosine > -1.0:
        screens.append(DirectionBound(config.min_cosine))
    if config.clip_norm:
        screens.append(NormClip(config.clip_norm))
    return tuple(screens)


def _privacy(config: StrategyConfig) -> CentralPrivacy | None:
    """Return the privacy, with defaults derived from the quorum."""
    chosen = config.privacy
    if chosen is None:
        return None
    expected = chosen.expected_update_count or config.quorum
    adaptive = AdaptiveBound(
        quantile=chosen.adaptive_quantile,
        learning_rate=chosen.adaptive_learning_rate,
        count_stddev=chosen.count_stddev or heuristic_count_stddev(expected),
    )
    return CentralPrivacy(
        clip_norm=chosen.clip_norm,
        noise_multiplier=chosen.noise_multiplier,
        expected_update_count=expected,
        adaptive=adaptive if chosen.adaptive_quantile else None,
        rounding=chosen.rounding,
        is_in_sum=chosen.shares is not None,
    )


def _rule(config: StrategyConfig) -> Rule:
    factory = RULES.get(config.name)
    if factory is not None:
        return factory(config)
    if config.name not in installed_names():
        known = ", ".join((*RULES, *installed_names()))
        raise StrategyConfigError(f"unknown strategy {config.name!r}; known: {known}")
    return load_rule(config)


def build(config: StrategyConfig, given: Collection[str] | None = None) -> Strategy:
    """Build the strategy of a new training session.

    Args:
        config: What the training session chooses.
        given: Names of the settings that it chooses itself; by default those that differ from their defaults.

    Raises:
        StrategyConfigError: Something is unknown, out of range, contradictory or without effect; the message is the
            reason.
    """
    check_ranges(config)
    check_bounds(config)
    strategy = rebuild(config)
    chosen = _changed(config) if given is None else given
    check_new(config, _optimizer_name(config), chosen, is_built_in=config.name in RULES)
    return strategy


def rebuild(config: StrategyConfig) -> Strategy:
    """Build the strategy of a stored training session, which an earlier release may have created.

    Raises:
        StrategyConfigError: Something is unknown, out of range or contradictory; the message is the reason.
    """
    check_ranges(config)
    rule = _rule(config)
    check_combination(config, rule)
    privacy = _privacy(config)
    screens = _screens(config)
    if privacy is not None and not config.secure_aggregation:
        screens = (*screens, privacy.screen)  # under secure aggregation the devices clip
    return Strategy(
        name=config.name,
        rule=rule,
        screens=screens,
        optimizer=_OPTIMIZERS[_optimizer_name(config)](config),
        privacy=privacy,
        device_settings=_device_settings(config),
    )


def _changed(config: StrategyConfig) -> list[str]:
    usual = StrategyConfig()
    return [
        item.name
        for item in fields(StrategyConfig)
        if getattr(config, item.name) != getattr(usual, item.name)
    ]


def begin(
    strategy: Strategy,
    element_count: int,
    base: Reader,
    prior: Prior | None = None,
    *,
    noise_seed: bytes | None = None,
    thread_count: int = 1,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    recorded: Mapping[str, UpdateAssessment] | None = None,
    excluded: Mapping[str, str] | None = None,
    revision: int = REVISION,
    resident_bytes: int | None = None,
    slice_elements: int | None = None,
    runner: PassRunner | None = None,
    spare: SpareTotal | None = None,
) -> Accumulator | CohortAggregation:
    """Begin an aggregation: an accumulator when the strategy folds, else one over the whole cohort.

    The same updates in the same order give the same bytes, whatever the threads and the budget.

    Args:
        strategy: From `build`.
        element_count: `n`, the floating elements of the model.
        base: The base version.
        prior: State persisted with the base version; by default that of version 0.
        noise_seed: The training session's secret, needed when the strategy has privacy.
        thread_count: Threads that share the work. With more than one, readers are called from several threads
            at once; with one, by the caller's only.
        budget_bytes: Memory for slices of a cohort rule. A fold takes eight bytes an element of a model of up to
            `accumulator.RESIDENT_BYTES`, and a few slices for each thread of a larger one.
        recorded: Judgements of an earlier run by update id (`by_update`), to recompute that version:
            nothing is judged or planned again.
        excluded: Reasons by update id of updates that are refused without being measured.
        revision: Number of the rules to aggregate by; to recompute a version, those that it was made by.
        resident_bytes: Largest total of a fold that is held in memory; None means `accumulator.RESIDENT_BYTES`.
        slice_elements: Elements of a larger total that a thread folds at once; None means `blocks.SLICE`.
        runner: Divides passes over all updates among several processes; None means that this one does them.
        spare: Keeps the total of a fold for the next one; None means that each allocates its own.
    """
    if strategy.folds:
        return Accumulator(
            strategy,
            element_count,
            base,
            prior,
            noise_seed=noise_seed,
            thread_count=thread_count,
            recorded=recorded,
            excluded=excluded,
            revision=revision,
            resident_bytes=resident_bytes,
            slice_elements=slice_elements,
            runner=runner,
            spare=spare,
        )
    return CohortAggregation(
        strategy,
        element_count,
        base,
        prior,
        noise_seed=noise_seed,
        thread_count=thread_count,
        budget_bytes=budget_bytes,
        recorded=recorded,
        excluded=excluded,
        revision=revision,
        runner=runner,
    )
