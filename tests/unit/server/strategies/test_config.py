from typing import Any

import pytest

from qflare_server.strategies import (
    Strategy,
    StrategyConfig,
    StrategyConfigError,
    build,
)
from qflare_server.strategies.catalogue import RULES

PRIVACY = {"clip_norm": 1.0, "noise_multiplier": 1.0, "epsilon_budget": 8.0, "delta": 1e-5}
NEEDED: dict[str, dict[str, Any]] = {
    "fedprox": {"proximal_mu": 0.1},
    "fedbuff": {"asynchronous": True},
}


@pytest.mark.parametrize("name", RULES)
def test_every_name_builds(name: str) -> None:
    strategy = build(StrategyConfig(name=name, quorum=3, **NEEDED.get(name, {})))

    assert strategy.name == name


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"name": "fedsgd"}, "unknown strategy 'fedsgd'; known: fedavg"),
    ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
    ({"weighting": "loss"}, "weighting must be examples or uniform"),
    ({"name": "fedadam", "optimizer": "yogi"}, "fedadam steps by adam"),
    ({"name": "krum", "quorum": 6, "byzantine_count": 2}, "at least 7 updates, got 6"),
    ({"name": "multi_krum", "quorum": 4, "byzantine_count": 1}, "at least 5"),
    ({"name": "bulyan", "quorum": 10, "byzantine_count": 2}, "at least 11"),
    (
        {"name": "multi_krum", "quorum": 7, "byzantine_count": 2, "selected_count": 6},
        "selected_count 6 exceeds quorum minus byzantine_count, 5",
    ),
    ({"name": "trimmed_mean", "trimmed_fraction": 0.5}, r"within \[0, 0.5\), got 0.5"),
    ({"name": "median", "asynchronous": True}, "fixed cohort"),
    ({"name": "krum", "quorum": 3, "asynchronous": True}, "fixed cohort"),
    ({"name": "fedavg", "asynchronous": True}, "stale update full weight"),
    ({"name": "fedyogi", "asynchronous": True}, "stale update full weight"),
    ({"name": "fedbuff"}, "set asynchronous"),
    ({"name": "fedavg", "max_staleness": 2}, "max_staleness only"),
    ({"name": "fedprox"}, "fedprox without proximal_mu"),
    ({"name": "scaffold", "weighting": "examples"}, "counts every update as one"),
    ({"name": "scaffold", "optimizer": "momentum"}, "no optimizer may scale"),
    ({"name": "scaffold", "server_learning_rate": 0.5}, "no optimizer may scale"),
    ({"name": "scaffold", "clip_norm": 1.0}, "clip_norm would scale or refuse"),
    ({"name": "scaffold", "max_norm": 1.0}, "max_norm would scale or refuse"),
    ({"name": "scaffold", "min_cosine": 0.0}, "min_cosine would scale or refuse"),
    ({"name": "scaffold", "privacy": PRIVACY}, "scaffold's hold control variates"),
    ({"name": "scaffold", "control_share": 0.0}, r"control_share must be within \(0, 1\]"),
    ({"name": "scaffold", "asynchronous": True}, "stale update full weight"),
    ({"name": "median", "weighting": "examples"}, "counts every update as one"),
    ({"name": "median", "secure_aggregation": True}, "looks at single updates"),
    ({"name": "geometric_median", "secure_aggregation": True}, "looks at single updates"),
    (
        {"name": "krum", "secure_aggregation": True, "quorum": 12, "group_quorum": 2},
        "krum needs a quorum of at least 3 groups",
    ),
    ({"clip_norm": 1.0, "secure_aggregation": True}, "clip_norm looks at single updates"),
    ({"max_norm": 1.0, "secure_aggregation": True}, "max_norm looks at single updates"),
    ({"min_cosine": 0.0, "secure_aggregation": True}, "min_cosine looks at single updates"),
    (
        {
            "quorum": 100,
            "privacy": {**PRIVACY, "adaptive_quantile": 0.5},
            "secure_aggregation": True,
        },
        "norms of single updates",
    ),
    ({"name": "median", "privacy": PRIVACY}, "sensitivity is not bounded"),
    ({"name": "geometric_median", "privacy": PRIVACY}, "sensitivity is not bounded"),
    ({"name": "fedbuff", "asynchronous": True, "privacy": PRIVACY}, "several times"),
    ({"weighting": "examples", "privacy": PRIVACY}, "mean with uniform weighting"),
    ({"clip_norm": 1.0, "privacy": PRIVACY}, "leave clip_norm at 0"),
    ({"privacy": {**PRIVACY, "accountant": "zcdp"}}, "accountant must be rdp or pld"),
    (
        {"quorum": 10, "privacy": {**PRIVACY, "adaptive_quantile": 0.5}},
        "noise_multiplier 1.0 must be below 1, twice count_stddev",
    ),
]


@pytest.mark.parametrize(("settings", "reason"), CONTRADICTIONS)
def test_contradictions_are_refused_with_the_reason(settings: dict[str, Any], reason: str) -> None:
    config = StrategyConfig.from_mapping(settings)

    with pytest.raises(StrategyConfigError, match=reason):
        build(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quorum", 0),
        ("server_learning_rate", -0.1),
        ("server_learning_rate", float("nan")),
        ("momentum", 1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("tau", 0.0),
        ("initial_second_moment", float("inf")),
        ("proximal_mu", -1.0),
        ("byzantine_count", -1),
        ("selected_count", -1),
        ("smoothing", 0.0),
        ("max_iterations", 0),
        ("max_staleness", -1),
        ("clip_norm", -1.0),
        ("max_norm", float("inf")),
        ("min_cosine", 1.0),
        ("min_cosine", -1.5),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(StrategyConfigError, match=f"^{name} must be"):
        build(StrategyConfig(**{name: value}))  # type: ignore[arg-type] # one of them is wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_norm", 0.0),
        ("noise_multiplier", 0.0),
        ("epsilon_budget", 0.0),
        ("delta", 0.0),
        ("delta", 1.0),
        ("sampling_probability", 0.0),
        ("sampling_probability", 1.1),
        ("adaptive_quantile", 1.0),
        ("adaptive_learning_rate", 0.0),
        ("count_stddev", -1.0),
        ("expected_update_count", -1),
    ],
)
def test_privacy_out_of_range_is_refused(name: str, value: float) -> None:
    config = StrategyConfig.from_mapping({"privacy": {**PRIVACY, name: value}})

    with pytest.raises(StrategyConfigError, match=rf"^privacy\.{name} must be"):
        build(config)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"nmae": "krum"}, "unknown setting 'nmae'"),
        ({"name": 3}, "name must be a str, got int"),
        ({"quorum": 2.5}, "quorum must be a int, got float"),
        ({"quorum": True}, "quorum must be a int, got bool"),
        ({"tau": "small"}, "tau must be a float, got str"),
        ({"privacy": 3}, "privacy must be a mapping"),
        ({"options": [1]}, "options must be a mapping"),
        ({"options": {"alpha": "x"}}, "alpha must be a float"),
        ({"privacy": {"clip_norm": 1.0}}, "privacy lacks noise_multiplier, epsilon_budget, delta"),
        ({"privacy": {**PRIVACY, "sigma": 1.0}}, "unknown setting 'sigma'"),
    ],
)
def test_other_data_is_refused(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(StrategyConfigError, match=reason):
        StrategyConfig.from_mapping(data)


def test_whole_floats_from_json_are_integers() -> None:
    config = StrategyConfig.from_mapping({"quorum": 5.0, "tau": 1})

    assert (config.quorum, config.tau) == (5, 1.0)


def test_fedprox_tells_the_devices_its_mu() -> None:
    strategy = build(StrategyConfig(name="fedprox", proximal_mu=0.01))

    assert strategy.device_settings == {"proximal_mu": 0.01}


def test_a_bare_fedavg_needs_nothing_but_the_updates() -> None:
    strategy = build(StrategyConfig())

    assert strategy.folds
    assert not strategy.needs_norm
    assert not strategy.needs_direction
    assert not strategy.initial_vectors
    assert not strategy.initial_scalars
    assert strategy.minimum_count == 1


@pytest.mark.parametrize(
    ("settings", "vectors"),
    [
        ({"name": "fedavgm"}, {"m": 0.0}),
        ({"name": "fedadam", "tau": 0.1}, {"m": 0.0, "v": 0.010000000000000002}),
        ({"name": "fedyogi", "initial_second_moment": 0.0}, {"m": 0.0, "v": 0.0}),
        ({"min_cosine": 0.0}, {"direction": 0.0}),
    ],
)
def test_state_vectors_are_declared(settings: dict[str, Any], vectors: dict[str, float]) -> None:
    assert build(StrategyConfig(**settings)).initial_vectors == vectors


def test_norms_are_needed_by_clipping() -> None:
    strategy: Strategy = build(StrategyConfig(clip_norm=1.0))

    assert strategy.needs_norm
