"""Strategy configuration: one frozen value per training session, stored and recorded in lineage.

A configuration is plain data; `build` validates it and states the reason when it is invalid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self

from qflare_server.strategies.errors import StrategyConfigError
from qflare_server.strategies.fedavg import Weighting
from qflare_server.strategies.interfaces import NOTHING


@dataclass(frozen=True, slots=True)
class NoiseShares:
    """Discrete Gaussian noise that is in the sum of the updates already.

    Attributes:
        count: Independent shares that the noise is at least the sum of, one or more.
        stddev: Parameter sigma of each share, in steps of the sum's integers; at least 0.5 if there are several.
        element_count: Most elements of a model.
    """

    count: int
    stddev: float
    element_count: int


@dataclass(frozen=True, slots=True)
class PrivacyConfig:
    """Central differential privacy of a training session.

    Attributes:
        clip_norm: L2 bound of every delta, or the first bound when it adapts. Above zero.
        noise_multiplier: Standard deviation of the noise over the sensitivity. Above zero.
        epsilon_budget: No version is released past this epsilon. Above zero.
        delta: The delta at which epsilon is stated, within (0, 1).
        expected_update_count: Fixed denominator of the mean; 0 stands for the quorum.
        sampling_probability: Probability with which each device is in a round, *independently and secretly*
            (Poisson sampling). One claims no amplification and is right for every other way of selecting.
        adaptive_quantile: Share of norms the clipping bound follows, within (0, 1); 0 keeps it fixed.
        adaptive_learning_rate: Geometric step of the bound. Above zero.
        count_stddev: Noise in the count of norms within the bound; 0 stands for a twentieth of the updates.
        accountant: `rdp` (Renyi orders, cheap) or `pld` (privacy loss distributions, tighter).
        rounding: Bound of the error by which a device rounds each element of its clipped delta; 0 for none.
        shares: Noise of `noise_multiplier` in the sum of the updates; None if the strategy adds it.
    """

    clip_norm: float
    noise_multiplier: float
    epsilon_budget: float
    delta: float
    expected_update_count: int = 0
    sampling_probability: float = 1.0
    adaptive_quantile: float = 0.0
    adaptive_learning_rate: float = 0.2
    count_stddev: float = 0.0
    accountant: str = "rdp"
    rounding: float = 0.0
    shares: NoiseShares | None = None


@dataclass(frozen=True, slots=True)
class StrategyConfig:
    """Strategy of a training session.

    Attributes:
        name: `fedavg`, `fedprox`, `scaffold`, `fedavgm`, `fedadam`, `fedyogi`, `fedadagrad`, `fedbuff`, `median`,
            `trimmed_mean`, `krum`, `multi_krum`, `bulyan`, `geometric_median`, or the name of an entry point.
        quorum: Updates a round closes with; for `fedbuff` the size of the buffer. One or more.
        weighting: `examples` or `uniform`; empty stands for the rule's usual one (`examples`, and `uniform`
            for `fedbuff`, the robust rules and under privacy).
        optimizer: `plain`, `momentum`, `adam`, `yogi`, `adagrad`; empty stands for the one in the name.
        server_learning_rate: Above zero; 0 stands for the optimizer's usual one (1, or 0.1 for adaptive ones).
        momentum: Of `momentum`, within [0, 1).
        beta1: Of the adaptive optimizers, within [0, 1).
        beta2: Of `adam` and `yogi`, within [0, 1).
        tau: Degree of adaptivity, above zero.
        initial_second_moment: Where `v` starts, zero or above; negative stands for `tau ** 2`.
        bias_correction: Of `adam`.
        proximal_mu: Sent to the devices, zero or above.
        control_share: Of `scaffold`, sent to the devices: updates of a round over all devices, within (0, 1].
        byzantine_count: Hostile updates that Krum, Multi-Krum and Bulyan withstand, the papers' f.
        selected_count: Updates Multi-Krum averages; 0 stands for `n - f - 2`.
        trimmed_fraction: Share of the updates `trimmed_mean` cuts off at either end, within [0, 0.5).
        smoothing: Smallest distance of the geometric median, above zero.
        max_iterations: Of the geometric median, one or more.
        max_staleness: Of `fedbuff`, zero or more.
        clip_norm: L2 bound to scale deltas down to; 0 for none. Privacy has its own.
        max_norm: L2 bound above which updates are refused; 0 for none.
        min_cosine: Smallest cosine to the previous aggregate, within [-1, 1); -1 for none.
        asynchronous: Whether the session accepts updates against older versions.
        secure_aggregation: Whether single updates are hidden from the coordinator.
        group_quorum: Fewest groups of updates whose means the rule takes instead of updates; 0 for none.
        privacy: Central differential privacy, or None.
        options: Numbers for a rule from an entry point.
    """

    name: str = "fedavg"
    quorum: int = 1
    weighting: Weighting | str = ""
    optimizer: str = ""
    server_learning_rate: float = 0.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    initial_second_moment: float = -1.0
    bias_correction: bool = False
    proximal_mu: float = 0.0
    control_share: float = 1.0
    byzantine_count: int = 0
    selected_count: int = 0
    trimmed_fraction: float = 0.1
    smoothing: float = 1e-6
    max_iterations: int = 1_000
    max_staleness: int = 0
    clip_norm: float = 0.0
    max_norm: float = 0.0
    min_cosine: float = -1.0
    asynchronous: bool = False
    secure_aggregation: bool = False
    group_quorum: int = 0
    privacy: PrivacyConfig | None = None
    options: Mapping[str, float] = field(default_factory=lambda: NOTHING)

    @classmethod
    def from_mapping(cls, data: Mapping[str, object]) -> Self:
        """Read a configuration; absent fields keep their defaults.

        Raises:
            StrategyConfigError: A field is unknown or of another type than its default.
        """
        values = dict(data)
        privacy = values.pop("privacy", None)
        options = values.pop("options", None) or {}
        if privacy is not None and not isinstance(privacy, Mapping):
            raise StrategyConfigError(f"privacy must be a mapping, got {type(privacy).__name__}")
        if not isinstance(options, Mapping):
            raise StrategyConfigError(f"options must be a mapping, got {type(options).__name__}")
        plain = _checked(values, _SESSION_TYPES)
        numbers = _checked(options, dict.fromkeys(options, float))
        secret = None if privacy is None else _privacy(privacy)
        return cls(**plain, privacy=secret, options=numbers)  # type: ignore[arg-type] # checked above


_SESSION_TYPES: dict[str, type] = {
    entry.name: type(entry.default)
    for entry in fields(StrategyConfig)
    if entry.name not in {"privacy", "options"}
}
_PRIVACY_TYPES: dict[str, type] = {
    **dict.fromkeys((entry.name for entry in fields(PrivacyConfig)), float),
    "expected_update_count": int,
    "accountant": str,
}


def _privacy(data: Mapping[str, object]) -> PrivacyConfig:
    """Read the privacy part."""
    values = _checked(data, _PRIVACY_TYPES)
    needed = ("clip_norm", "noise_multiplier", "epsilon_budget", "delta")
    missing = [name for name in needed if name not in values]
    if missing:
        raise StrategyConfigError(f"privacy lacks {', '.join(missing)}")
    return PrivacyConfig(**values)  # type: ignore[arg-type] # checked above


def _checked(values: Mapping[str, object], types: Mapping[str, type]) -> dict[str, object]:
    """Check names and types; a whole number is also a float, but a truth value is no number."""
    checked: dict[str, object] = {}
    for name, value in values.items():
        wanted = types.get(name)
        if wanted is None:
            raise StrategyConfigError(f"unknown setting {name!r}")
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)  # noqa: PLW2901 - the converted value replaces the given one
        if wanted is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # noqa: PLW2901 - JSON from protobuf has floats only
        if type(value) is not wanted:
            raise StrategyConfigError(
                f"{name} must be a {wanted.__name__}, got {type(value).__name__}"
            )
        checked[name] = value
    return checked
