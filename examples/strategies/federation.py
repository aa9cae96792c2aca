"""Federated training in one process, without a network.

Devices train on handwritten digits. The strategies are those of the coordinator (`qflare_server.strategies`) and are
called in the same way; the rest of the coordinator is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from data import CLASS_COUNT, Examples, IntArray, dirichlet_partition, load
from model import Weights, fit, initial_weights, measure
from numpy.typing import NDArray

from qflare_server.strategies import Contribution, Prior, Reader, Strategy, begin

Vector = NDArray[np.float64]
Attack = str
"""Behavior of hostile devices: `none`, `label flip` or `sign flip`."""

SIGN_FLIP_FACTOR = -4.0
"""Factor by which a sign-flipping device multiplies its change (Li et al. 2019, arXiv:1811.03761, section 5)."""
LOCAL_EPOCHS = 1
BATCH_SIZE = 16
LEARNING_RATE = 0.1
SEED = 1


@dataclass(frozen=True)
class Model:
    """The digits model as one vector."""

    layout: Weights = field(default_factory=initial_weights)

    def flat(self, weights: Weights) -> Vector:
        """Return tensors as one vector."""
        return np.concatenate([weights[name].ravel() for name in self.layout]).astype(np.float64)

    def tensors(self, vector: Vector) -> Weights:
        """Return a vector as tensors."""
        parts = np.split(vector, np.cumsum([values.size for values in self.layout.values()])[:-1])
        return {
            name: part.reshape(values.shape).astype(np.float32)
            for part, (name, values) in zip(parts, self.layout.items(), strict=True)
        }


@dataclass(frozen=True)
class Fleet:
    """Devices with their training examples; the last `hostile_count` devices are hostile.

    Attributes:
        parts: Training examples of each device.
        test: Held-out examples.
        attack: Behavior of the hostile devices.
        hostile_count: Number of hostile devices.
    """

    parts: Sequence[Examples]
    test: Examples
    attack: Attack = "none"
    hostile_count: int = 0
    model: Model = field(default_factory=Model)

    def is_hostile(self, device: int) -> bool:
        """Return whether a device is hostile."""
        return self.attack != "none" and device >= len(self.parts) - self.hostile_count

    def change(
        self, base: Vector, device: int, round_number: int, proximal_mu: float = 0.0
    ) -> Vector:
        """Return the change of a version's weights by the training of a device."""
        examples = self.parts[device]
        if self.attack == "label flip" and self.is_hostile(device):
            examples = Examples(examples.images, CLASS_COUNT - 1 - examples.digits)
        trained = fit(
            self.model.tensors(base),
            examples,
            epochs=LOCAL_EPOCHS,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            seed=10_000 * device + round_number,
            proximal_mu=proximal_mu,
        )
        change = self.model.flat(trained) - base
        flips = self.attack == "sign flip" and self.is_hostile(device)
        return change * SIGN_FLIP_FACTOR if flips else change

    def accuracy(self, weights: Vector) -> float:
        """Return the accuracy on the test examples, 0 to 1."""
        if not np.all(np.isfinite(weights)):
            return 1 / CLASS_COUNT
        return measure(self.model.tensors(weights), self.test)["accuracy"]


def uneven_fleet(alpha: float, device_count: int, attack: Attack, hostile_count: int) -> Fleet:
    """Return a fleet with classes in Dirichlet(alpha) shares and randomly chosen hostile devices."""
    everything, test = load()
    parts = dirichlet_partition(everything.digits, device_count, alpha, seed=SEED, least=4)
    order = np.random.default_rng(SEED).permutation(device_count)
    return Fleet([everything.take(parts[index]) for index in order], test, attack, hostile_count)


def even_fleet(device_count: int) -> Fleet:
    """Return a fleet whose devices have the same number of random examples."""
    everything, test = load()
    order: IntArray = np.random.default_rng(SEED).permutation(len(everything))
    parts = np.array_split(order, device_count)
    return Fleet([everything.take(part) for part in parts], test)


@dataclass
class Server:
    """The coordinator's side of training: the current version, and the state of its strategy."""

    strategy: Strategy
    weights: Vector
    prior: Prior = field(default_factory=Prior)
    noise_seed: bytes = bytes(16)

    def publish(self, contributions: Sequence[Contribution]) -> None:
        """Aggregate updates into the next version."""
        aggregation = begin(
            self.strategy,
            self.weights.size,
            reader(self.weights),
            self.prior,
            noise_seed=self.noise_seed,
        )
        aggregation.extend(contributions)
        weights = np.empty_like(self.weights)
        vectors = {name: np.empty_like(weights) for name in self.strategy.initial_vectors}
        for piece in aggregation.finish():
            weights[piece.start : piece.stop] = piece.weights
            for name, values in piece.vectors.items():
                vectors[name][piece.start : piece.stop] = values
        self.weights = weights
        self.prior = Prior(
            scalars=aggregation.outcome.scalars,
            vectors={name: reader(values) for name, values in vectors.items()},
            version=self.prior.version + 1,
        )


def reader(vector: Vector) -> Reader:
    """Return a reader of slices of a vector."""
    return lambda start, stop: vector[start:stop]


def run_rounds(fleet: Fleet, strategy: Strategy, round_count: int, seed: int = SEED) -> list[float]:
    """Train in rounds with all devices; return the accuracy after each round."""
    server = Server(strategy, fleet.model.flat(initial_weights(seed)))
    mu = strategy.device_settings.get("proximal_mu", 0.0)
    accuracies = []
    for number in range(1, round_count + 1):
        base = server.weights
        changes = [fleet.change(base, index, number, mu) for index in range(len(fleet.parts))]
        server.publish(
            [
                Contribution(f"{index:03}", len(part), reader(change))
                for index, (part, change) in enumerate(zip(fleet.parts, changes, strict=True))
            ]
        )
        accuracies.append(fleet.accuracy(server.weights))
    return accuracies
