"""Validation of strategy configurations: ranges, contradictions, settings without effect."""

from collections.abc import Callable, Collection, Mapping
from math import ceil, isfinite
from typing import Final

from qflare_server.strategies.accounting import ACCOUNTANTS, require_library
from qflare_server.strategies.config import PrivacyConfig, StrategyConfig
from qflare_server.strategies.errors import StrategyConfigError
from qflare_server.strategies.fedavg import WeightedMean
from qflare_server.strategies.interfaces import CohortRule, FoldRule
from qflare_server.strategies.privacy import (
    heuristic_count_stddev,
    smallest_noise_multiplier,
)

_Test = Callable[[float], bool]


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _decay(value: float) -> bool:
    return 0 <= value < 1


def _open_unit(value: float) -> bool:
    return 0 < value < 1


_RANGES: Final[dict[str, tuple[_Test, str]]] = {
    "quorum": (lambda value: value >= 1, "at least 1"),
    "server_learning_rate": (_not_negative, "0 or above"),
    "momentum": (_decay, "within [0, 1)"),
    "beta1": (_decay, "within [0, 1)"),
    "beta2": (_decay, "within [0, 1)"),
    "tau": (_positive, "above 0"),
    "initial_second_moment": (lambda _: True, "finite"),
    "proximal_mu": (_not_negative, "0 or above"),
    "control_share": (lambda value: 0 < value <= 1, "within (0, 1]"),
    "byzantine_count": (_not_negative, "0 or above"),
    "selected_count": (_not_negative, "0 or above"),
    "trimmed_fraction": (lambda value: 0 <= value < 0.5, "within [0, 0.5)"),  # noqa: PLR2004 - a half
    "smoothing": (_positive, "above 0"),
    "max_iterations": (lambda value: value >= 1, "at least 1"),
    "max_staleness": (_not_negative, "0 or above"),
    "clip_norm": (_not_negative, "0 or above"),
    "max_norm": (_not_negative, "0 or above"),
    "min_cosine": (lambda value: -1 <= value < 1, "within [-1, 1)"),
}
_PRIVACY_RANGES: Final[dict[str, tuple[_Test, str]]] = {
    "clip_norm": (_positive, "above 0"),
    "noise_multiplier": (_positive, "above 0"),
    "epsilon_budget": (_positive, "above 0"),
    "delta": (_open_unit, "within (0, 1)"),
    "expected_update_count": (_not_negative, "0 or above"),
    "sampling_probability": (lambda value: 0 < value <= 1, "within (0, 1]"),
    "adaptive_quantile": (_decay, "within [0, 1)"),
    "adaptive_learning_rate": (_positive, "above 0"),
    "count_stddev": (_not_negative, "0 or above"),
    "rounding": (_not_negative, "0 or above"),
}


_NEW_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "server_learning_rate": (0, 1e6),
    "tau": (1e-30, 1e30),
    "initial_second_moment": (-1e60, 1e60),
    "proximal_mu": (0, 1e6),
    "smoothing": (1e-60, 1e60),
    "max_iterations": (1, 1e6),
}
"""Beyond these bounds, no version would be produced, or only after days."""


def check_ranges(config: StrategyConfig) -> None:
    """Refuse the first number that is out of its range.

    Raises:
        StrategyConfigError: The message gives the setting, the range and the value.
    """
    _check(config, _RANGES, "")
    if config.privacy is not None:
        _check(config.privacy, _PRIVACY_RANGES, "privacy.")


def _check(
    config: StrategyConfig | PrivacyConfig, ranges: dict[str, tuple[_Test, str]], prefix: str
) -> None:
    for name, (test, wanted) in ranges.items():
        value = getattr(config, name)
        if not (isfinite(value) and test(value)):
            raise StrategyConfigError(f"{prefix}{name} must be {wanted}, got {value}")


def check_combination(config: StrategyConfig, rule: FoldRule | CohortRule) -> None:
    """Refuse settings that contradict each other.

    Raises:
        StrategyConfigError: The message says which, and why they do not go together.
    """
    if isinstance(rule, CohortRule):
        _check_cohort(config, rule)
    _check_rhythm(config)
    _check_weighting(config, rule)
    if config.name == "scaffold":
        _check_controls(config)
    if config.secure_aggregation:
        _check_hidden(config, rule)
    if config.privacy is not None:
        _check_privacy(config, config.privacy, rule)


_SECOND_MOMENT: Final = frozenset({"beta1", "tau", "initial_second_moment"})
_OPTIMIZER_SETTINGS: Final[Mapping[str, frozenset[str]]] = {
    "plain": frozenset(),
    "momentum": frozenset({"momentum"}),
    "adam": _SECOND_MOMENT | {"beta2", "bias_correction"},
    "yogi": _SECOND_MOMENT | {"beta2"},
    "adagrad": _SECOND_MOMENT,
}
_RULE_SETTINGS: Final[Mapping[str, frozenset[str]]] = {
    "fedbuff": frozenset({"max_staleness"}),
    "scaffold": frozenset({"control_share"}),
    "trimmed_mean": frozenset({"trimmed_fraction"}),
    "geometric_median": frozenset({"smoothing", "max_iterations"}),
    "krum": frozenset({"byzantine_count"}),
    "multi_krum": frozenset({"byzantine_count", "selected_count"}),
    "bulyan": frozenset({"byzantine_count"}),
}
_SETTINGS: Final = frozenset().union(*_RULE_SETTINGS.values(), *_OPTIMIZER_SETTINGS.values())
"""Settings that only some rules or optimizers read."""


def check_bounds(config: StrategyConfig) -> None:
    """Reject numbers in range with which no version would be produced; for new training sessions only.

    Raises:
        StrategyConfigError: The message gives the setting, its bounds and the value.
    """
    for name, (least, most) in _NEW_BOUNDS.items():
        if not least <= getattr(config, name) <= most:
            raise StrategyConfigError(
                f"{name} must be within [{least:g}, {most:g}], got {getattr(config, name):g}"
            )


def check_new(
    config: StrategyConfig, optimizer: str, given: Collection[str], *, is_built_in: bool
) -> None:
    """Reject what earlier releases accepted: existing training sessions continue, new ones cannot be created.

    Args:
        config: That passed the other checks.
        optimizer: Name of the server optimizer.
        given: Settings that were chosen.
        is_built_in: Whether the rule is one of QFLARE's, whose settings are known.

    Raises:
        StrategyConfigError: A setting has no effect, or would disclose facts about single devices despite the privacy.
    """
    used = _RULE_SETTINGS.get(config.name, frozenset()) | _OPTIMIZER_SETTINGS[optimizer]
    unused = sorted(_SETTINGS.intersection(given) - used)
    if unused and is_built_in:
        raise StrategyConfigError(
            f"{config.name} with optimizer {optimizer} does not use {', '.join(unused)}"
        )
    if config.privacy is None:
        return
    for name, idle in (("max_norm", 0.0), ("min_cosine", -1.0)):
        if getattr(config, name) != idle:
            raise StrategyConfigError(
                f"{name} refuses single updates, and the number of contributors, which is published, tells which: "
                "no noise covers it; privacy clips instead"
            )


def ineffective(config: StrategyConfig) -> str:
    """Return why a rule has no effect beyond a plain mean at the quorum of its training session.

    Args:
        config: That passed the checks.

    Returns:
        The reason and the remedy; empty if the rule has an effect.
    """
    quorum, name = least_compared(config), config.name
    what = "groups" if config.group_quorum else "updates"
    closing = f"rounds close from {quorum} {what} on"
    if name == "trimmed_mean" and int(config.trimmed_fraction * quorum) == 0:
        if not config.trimmed_fraction:
            return "trimmed_mean with trimmed_fraction 0 trims nothing: raise trimmed_fraction"
        return (
            f"trimmed_mean with trimmed_fraction {config.trimmed_fraction:g} trims nothing of fewer than "
            f"{ceil(1 / config.trimmed_fraction)} {what}, and {closing}: raise either"
        )
    if name in {"median", "geometric_median"} and quorum <= _PAIR:
        return f"{name} of one or two {what} is their mean, and {closing}: raise rounds.quorum"
    if name == "bulyan" and config.byzantine_count == 0:
        return f"bulyan with byzantine_count 0 averages every {what.removesuffix('s')}: raise byzantine_count"
    if name == "multi_krum" and config.selected_count >= quorum:
        return (
            f"multi_krum with selected_count {config.selected_count} selects all of so many updates, "
            f"and {closing}: lower selected_count"
        )
    return ""


_PAIR: Final = 2


def _check_cohort(config: StrategyConfig, rule: CohortRule) -> None:
    if config.asynchronous:
        raise StrategyConfigError(
            f"{config.name} compares the updates of one fixed cohort against one base version; "
            "an asynchronous session has neither"
        )
    least = least_compared(config)
    if least < rule.minimum_count:
        what = (
            "groups of secure_aggregation.group_size updates" if config.group_quorum else "updates"
        )
        raise StrategyConfigError(
            f"{config.name} needs a quorum of at least {rule.minimum_count} {what}, got {least}"
        )
    _check_selection(config)


def least_compared(config: StrategyConfig) -> int:
    """Return the fewest updates, or means of groups, that a rule gets."""
    return config.group_quorum or config.quorum


def _check_selection(config: StrategyConfig) -> None:
    most = least_compared(config) - config.byzantine_count
    if config.name == "multi_krum" and config.selected_count > most:
        raise StrategyConfigError(
            f"selected_count {config.selected_count} exceeds quorum minus byzantine_count, {most}: "
            "a hostile update would always be among the selected"
        )


def _check_rhythm(config: StrategyConfig) -> None:
    if config.name == "fedbuff" and not config.asynchronous:
        raise StrategyConfigError(
            "fedbuff buffers updates of an asynchronous session; set asynchronous"
        )
    if (
        config.asynchronous
        and config.name in {"fedavg", "fedprox", "scaffold"} | _SYNCHRONOUS_OPTIMIZERS
    ):
        raise StrategyConfigError(
            f"{config.name} gives a stale update full weight; an asynchronous session takes fedbuff "
            "with the optimizer of your choice"
        )
    if config.max_staleness and not config.asynchronous:
        raise StrategyConfigError("max_staleness only has a meaning in an asynchronous session")
    if config.name == "fedprox" and not config.proximal_mu:
        raise StrategyConfigError("fedprox without proximal_mu is fedavg; set proximal_mu above 0")


_SYNCHRONOUS_OPTIMIZERS: Final = {"fedavgm", "fedadam", "fedyogi", "fedadagrad"}


def _check_weighting(config: StrategyConfig, rule: FoldRule | CohortRule) -> None:
    if isinstance(rule, CohortRule) and config.weighting == "examples" and not rule.weighs_examples:
        raise StrategyConfigError(
            f"{config.name} counts every update as one: a device could lie about its example count"
        )


def _check_controls(config: StrategyConfig) -> None:
    """Reject settings under which the coordinator's control variate is not the mean of the devices' own."""
    if config.weighting == "examples":
        raise StrategyConfigError("scaffold counts every update as one; leave weighting uniform")
    if config.optimizer not in {"", "plain"} or config.server_learning_rate not in {0.0, 1.0}:
        raise StrategyConfigError(
            "scaffold adds the mean of the updates as it is: no optimizer may scale the control variates in it"
        )
    for name, idle in (("clip_norm", 0.0), ("max_norm", 0.0), ("min_cosine", -1.0)):
        if getattr(config, name) != idle:
            raise StrategyConfigError(
                f"{name} would scale or refuse control variates that their device already counts as sent"
            )
    if config.privacy is not None:
        raise StrategyConfigError("privacy clips updates, and scaffold's hold control variates")


def _check_hidden(config: StrategyConfig, rule: FoldRule | CohortRule) -> None:
    """Reject parts that read single updates under secure aggregation, which shows the coordinator only a sum."""
    compares_groups = isinstance(rule, CohortRule) and config.group_quorum
    if not compares_groups and (isinstance(rule, CohortRule) or rule.needs_norm):
        raise StrategyConfigError(
            f"{config.name} looks at single updates, which secure aggregation hides"
        )
    for name, idle in (("clip_norm", 0.0), ("max_norm", 0.0), ("min_cosine", -1.0)):
        if getattr(config, name) != idle:
            raise StrategyConfigError(
                f"{name} looks at single updates, which secure aggregation hides"
            )
    if config.privacy is not None and config.privacy.adaptive_quantile:
        raise StrategyConfigError(
            "an adaptive clipping bound counts the norms of single updates, which secure aggregation hides"
        )


def _check_privacy(
    config: StrategyConfig, privacy: PrivacyConfig, rule: FoldRule | CohortRule
) -> None:
    if isinstance(rule, CohortRule):
        raise StrategyConfigError(
            f"one device can move {config.name} by more than its clipped share; "
            "its sensitivity is not bounded and no noise is enough"
        )
    if config.asynchronous:
        raise StrategyConfigError(
            "a device may be in a buffer several times; the guarantee is for one update a device and version"
        )
    if rule != WeightedMean("uniform"):
        raise StrategyConfigError(
            "privacy needs a mean with uniform weighting: any other weight, such as an example count, scales "
            "a device past the clipping bound"
        )
    if config.clip_norm:
        raise StrategyConfigError("privacy brings its own clipping; leave clip_norm at 0")
    if privacy.accountant not in ACCOUNTANTS:
        raise StrategyConfigError(f"accountant must be rdp or pld, got {privacy.accountant!r}")
    require_library()
    _check_adaptive(config, privacy)


def _check_adaptive(config: StrategyConfig, privacy: PrivacyConfig) -> None:
    if not privacy.adaptive_quantile:
        return
    expected = privacy.expected_update_count or config.quorum
    bound = smallest_noise_multiplier(privacy.count_stddev or heuristic_count_stddev(expected))
    if privacy.noise_multiplier >= bound:
        raise StrategyConfigError(
            f"noise_multiplier {privacy.noise_multiplier} must be below {bound:.6g}, twice count_stddev: "
            "the noisy count alone would spend the budget"
        )
