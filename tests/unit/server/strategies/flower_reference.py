"""Aggregates by Flower's own strategies; runs under an interpreter that has `flwr` (see `flower`).

    python flower_reference.py updates.npz results.npz

`updates.npz` holds `base` (n,), `weights` (k, n) and `counts` (k,); the results hold one array per rule, and for
the server optimizers one row per version, made from the same deltas again and again. Not a test module, and
not imported by one: Flower needs another protobuf than QFLARE.
"""

import sys
from collections.abc import Callable
from typing import Any

import flwr.server.strategy as rules
import numpy as np
from flwr.common import (
    Code,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.strategy.aggregate import aggregate_krum
from numpy.typing import NDArray

Array = NDArray[np.float64]
VERSIONS = 4
BYZANTINE = 2


def results_of(weights: Array, counts: NDArray[np.int64]) -> list[tuple[Any, Any]]:
    """Wrap updates as Flower receives them."""
    return [
        (None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([row]), int(count), {}))
        for row, count in zip(weights, counts, strict=True)
    ]


def once(strategy: Any, weights: Array, counts: NDArray[np.int64]) -> Array:
    """Aggregate one round."""
    parameters, _ = strategy.aggregate_fit(1, results_of(weights, counts), [])
    return np.asarray(parameters_to_ndarrays(parameters)[0])


def repeated(
    make: Callable[[Any], Any],
    base: Array,
    deltas: Array,
    counts: NDArray[np.int64],
    first_round: int,
) -> Array:
    """Aggregate several rounds, each from the version before."""
    strategy, current, made = make(ndarrays_to_parameters([base])), base, []
    for number in range(first_round, first_round + VERSIONS):
        results = results_of(current + deltas, counts)
        parameters, _ = strategy.aggregate_fit(number, results, [])
        current = np.asarray(parameters_to_ndarrays(parameters)[0])
        made.append(current)
    return np.array(made)


def robust(weights: Array, ones: NDArray[np.int64]) -> dict[str, Array]:
    """Aggregate by the rules that count every update as one."""
    return {
        "median": once(rules.FedMedian(), weights, ones),
        "trimmed_mean": once(rules.FedTrimmedAvg(beta=0.2), weights, ones),
        "krum": once(rules.Krum(num_malicious_clients=BYZANTINE), weights, ones),
        "multi_krum": once(
            rules.Krum(num_malicious_clients=BYZANTINE, num_clients_to_keep=5), weights, ones
        ),
        "bulyan": once(
            rules.Bulyan(
                num_malicious_clients=BYZANTINE, first_aggregation_rule=aggregate_krum, to_keep=0
            ),
            weights,
            ones,
        ),
    }


def optimized(base: Array, deltas: Array, counts: NDArray[np.int64]) -> dict[str, Array]:
    """Aggregate by the server optimizers. FedAdam's bias correction is one round ahead of the paper's."""
    shared = {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    makers: dict[str, tuple[Callable[[Any], Any], int]] = {
        "fedavgm": (
            lambda initial: rules.FedAvgM(
                initial_parameters=initial, server_momentum=0.9, server_learning_rate=0.5
            ),
            1,
        ),
        "fedadam": (lambda initial: rules.FedAdam(initial_parameters=initial, **shared), 0),
        "fedyogi": (lambda initial: rules.FedYogi(initial_parameters=initial, **shared), 1),
        "fedadagrad": (
            lambda initial: rules.FedAdagrad(initial_parameters=initial, eta=0.1, tau=1e-3),
            1,
        ),
    }
    return {
        name: repeated(make, base, deltas, counts, first) for name, (make, first) in makers.items()
    }


def main(source: str, target: str) -> None:
    """Read updates, write results."""
    data = np.load(source)
    base, weights, counts = data["base"], data["weights"], data["counts"]
    results = {
        "fedavg": once(rules.FedAvg(inplace=False), weights, counts),
        **robust(weights, np.ones_like(counts)),
        **optimized(base, weights - base, counts),
    }
    np.savez(target, **results)  # type: ignore[arg-type] # arrays by name


if __name__ == "__main__":
    main(*sys.argv[1:])
