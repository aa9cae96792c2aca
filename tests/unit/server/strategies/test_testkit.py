from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_server.strategies import Facts, Strategy, StrategyConfig, build
from qflare_server.strategies.errors import StrategyContractError
from qflare_server.strategies.fedavg import WeightedMean
from qflare_server.strategies.interfaces import FoldRule, ServerOptimizer, SliceRule
from qflare_server.strategies.testkit import Promises, check_strategy, sample
from qflare_server.strategies.types import Vector

SCREENS = {"clip_norm": 0.8, "max_norm": 5.0, "min_cosine": -0.5}
CASES: dict[str, dict[str, object]] = {
    "fedavg": {},
    "fedavgm": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedadam": {"bias_correction": True},
    "fedyogi": {},
    "fedadagrad": {},
    "fedbuff": {"asynchronous": True, "max_staleness": 2},
    "median": {},
    "trimmed_mean": {},
    "krum": {"byzantine_count": 2},
    "multi_krum": {"byzantine_count": 2},
    "bulyan": {"byzantine_count": 2},
    "geometric_median": {},
}


@pytest.mark.parametrize("name", CASES)
def test_every_rule_keeps_its_promises(name: str) -> None:
    config = StrategyConfig.from_mapping({"name": name, "quorum": 11, **CASES[name]})

    check_strategy(build(config))


@pytest.mark.parametrize("name", CASES)
def test_every_rule_keeps_them_behind_screens(name: str) -> None:
    config = StrategyConfig.from_mapping({"name": name, "quorum": 11, **CASES[name], **SCREENS})

    check_strategy(build(config))


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_privacy_keeps_them_too(quantile: float) -> None:
    privacy = {
        "clip_norm": 0.9,
        "noise_multiplier": 0.4,
        "epsilon_budget": 100.0,
        "delta": 1e-5,
        "adaptive_quantile": quantile,
    }
    config = StrategyConfig.from_mapping({"name": "fedyogi", "quorum": 11, "privacy": privacy})

    check_strategy(build(config))


class LooksAround(SliceRule):
    """Breaks slicing: an element depends on its neighbors in the slice."""

    @property
    def minimum_count(self) -> int:
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        result: Vector = matrix.astype(np.float64).mean(axis=0)
        result += result[0]
        return result


class Forgetful(FoldRule):
    """Breaks crash-exactness: it counts in memory."""

    seen: ClassVar[list[int]] = []

    def share(self, facts: Facts) -> tuple[float, float]:
        self.seen.append(facts.example_count)
        return float(len(self.seen)), 1.0


class FirstOnly(SliceRule):
    """Breaks permutation: it takes whoever came first."""

    @property
    def minimum_count(self) -> int:
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        return np.array(matrix[0], dtype=np.float64)


class Shifted(SliceRule):
    """Breaks scaling: it adds a constant."""

    @property
    def minimum_count(self) -> int:
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        return np.array(matrix.min(axis=0), dtype=np.float64) + 1.0


class Doubled(FoldRule):
    """Breaks unanimity."""

    def share(self, facts: Facts) -> tuple[float, float]:
        return 2.0 * facts.example_count, float(facts.example_count)


class Scribbling(SliceRule):
    """Loses precision: its result depends on the dtype it is given."""

    @property
    def minimum_count(self) -> int:
        return 1

    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        return np.array(matrix.sum(axis=0), dtype=np.float64)


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (LooksAround(), "the weights depend on the slice"),
        (Forgetful(), "depend on"),
        (Scribbling(), "the readers' dtype"),
        (FirstOnly(), "the order of acceptance"),
        (Shifted(), "is not 4.0 times the aggregate"),
        (Doubled(), "the aggregate of identical updates is another update"),
    ],
)
def test_a_broken_promise_is_found(rule: FoldRule | SliceRule, broken: str) -> None:
    with pytest.raises(StrategyContractError, match=broken):
        check_strategy(Strategy(name="broken", rule=rule))


def test_a_promise_not_made_is_not_checked() -> None:
    rule = Shifted()

    check_strategy(Strategy("shifted", rule), Promises(scaling=False, unanimity=False))


class Undeclared(ServerOptimizer):
    """Keeps a state vector it did not declare."""

    def step(
        self,
        base: Vector,
        aggregate: Vector,
        vectors: Mapping[str, Vector],  # noqa: ARG002
        scalars: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[Vector, Mapping[str, Vector]]:
        return base + aggregate, {"hidden": aggregate}


def test_an_undeclared_state_vector_is_found() -> None:
    strategy = Strategy("undeclared", WeightedMean(), optimizer=Undeclared())

    with pytest.raises(StrategyContractError, match="hidden"):
        check_strategy(strategy)


class Infinite(ServerOptimizer):
    """Gives a result that is not finite."""

    def step(
        self,
        base: Vector,
        aggregate: Vector,  # noqa: ARG002
        vectors: Mapping[str, Vector],  # noqa: ARG002
        scalars: Mapping[str, float],  # noqa: ARG002
    ) -> tuple[Vector, Mapping[str, Vector]]:
        return np.full_like(base, np.inf), {}


def test_a_result_that_is_not_finite_is_found() -> None:
    strategy = Strategy("infinite", WeightedMean(), optimizer=Infinite())

    with pytest.raises(StrategyContractError, match="finite updates"):
        check_strategy(strategy)


def test_samples_repeat() -> None:
    one, other = sample(3, 10, seed=4), sample(3, 10, seed=4)

    assert one.deltas.tobytes() == other.deltas.tobytes()
    assert one.example_counts == other.example_counts
