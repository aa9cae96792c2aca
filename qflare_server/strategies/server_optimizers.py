"""Server optimizers: the step from the aggregate delta to the version.

The adaptive three follow Reddi et al. 2021 (arXiv:2003.00295), Algorithm 2, in which the aggregate delta is used as
a negative gradient:

    m_t = beta1 * m_(t-1) + (1 - beta1) * delta_t
    w_t = w_(t-1) + eta * m_t / (sqrt(v_t) + tau)

and differ in `v_t`. The paper has no bias correction and starts `v` at tau squared or above; both are
configurable, because other implementations differ. All arithmetic is elementwise in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from qflare_server.strategies.interfaces import NOTHING, ServerOptimizer
from qflare_server.strategies.types import Vector


@dataclass(frozen=True, slots=True)
class PlainStep(ServerOptimizer):
    """Add the aggregate times a learning rate.

    Attributes:
        learning_rate: The server learning rate; one is federated averaging.
    """

    learning_rate: float = 1.0

    def step(
        self,
        base: Vector,
        aggregate: Vector,
        vectors: Mapping[str, Vector],  # noqa: ARG002 - the contract's signature
        scalars: Mapping[str, float],  # noqa: ARG002 - the contract's signature
    ) -> tuple[Vector, Mapping[str, Vector]]:
        """Return `base + learning_rate * aggregate`."""
        if self.learning_rate == 1.0:
            return base + aggregate, {}
        return base + self.learning_rate * aggregate, {}


@dataclass(frozen=True, slots=True)
class MomentumStep(ServerOptimizer):
    """Server momentum: `m = momentum * m + delta`, `w = w + learning_rate * m`.

    Source: Hsu et al. 2019, arXiv:1909.06335, section 4.3 (FedAvgM).
    """

    learning_rate: float = 1.0
    momentum: float = 0.9

    @property
    def initial_vectors(self) -> Mapping[str, float]:
        """Keep the velocity `m`, zero at first."""
        return {"m": 0.0}

    def step(
        self,
        base: Vector,
        aggregate: Vector,
        vectors: Mapping[str, Vector],
        scalars: Mapping[str, float],  # noqa: ARG002 - the contract's signature
    ) -> tuple[Vector, Mapping[str, Vector]]:
        """Update the velocity and add it."""
        velocity = self.momentum * vectors["m"] + aggregate
        return base + self.learning_rate * velocity, {"m": velocity}


@dataclass(frozen=True, slots=True)
class AdagradStep(ServerOptimizer):
    """FedAdagrad: `v_t = v_(t-1) + delta_t ** 2`.

    Attributes:
        learning_rate: The paper's eta.
        beta1: Decay of `m`; the paper's Algorithm 2 has it for all three.
        tau: Degree of adaptivity, above zero.
        initial_second_moment: First value of `v`.

    Source: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line for FedAdagrad.
    """

    learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3
    initial_second_moment: float = 1e-6

    @property
    def initial_vectors(self) -> Mapping[str, float]:
        """Keep both moments."""
        return {"m": 0.0, "v": self.initial_second_moment}

    def second_moment(self, previous: Vector, squared: Vector) -> Vector:
        """Return `v_t` from `v_(t-1)` and the squared aggregate."""
        return previous + squared

    def rate(self, scalars: Mapping[str, float]) -> float:  # noqa: ARG002 - Adam needs the step count
        """Return the learning rate of this version."""
        return self.learning_rate

    def step(
        self,
        base: Vector,
        aggregate: Vector,
        vectors: Mapping[str, Vector],
        scalars: Mapping[str, float],
    ) -> tuple[Vector, Mapping[str, Vector]]:
        """Update both moments and take the adaptive step."""
        first = self.beta1 * vectors["m"] + (1.0 - self.beta1) * aggregate
        second = self.second_moment(vectors["v"], aggregate * aggregate)
        step = self.rate(scalars) * first / (np.sqrt(second) + self.tau)
        return base + step, {"m": first, "v": second}


@dataclass(frozen=True, slots=True)
class YogiStep(AdagradStep):
    """FedYogi: `v_t = v_(t-1) - (1 - beta2) * delta_t ** 2 * sign(v_(t-1) - delta_t ** 2)`.

    Attributes:
        beta2: Decay of `v`.

    Source: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line for FedYogi.
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def second_moment(self, previous: Vector, squared: Vector) -> Vector:
        """Move `v` towards the squared aggregate by a step that does not depend on their distance."""
        return previous - (1.0 - self.beta2) * squared * np.sign(previous - squared)


@dataclass(frozen=True, slots=True)
class AdamStep(AdagradStep):
    """FedAdam: `v_t = beta2 * v_(t-1) + (1 - beta2) * delta_t ** 2`.

    Attributes:
        beta2: Decay of `v`.
        bias_correction: Whether the learning rate of version t is multiplied by
            `sqrt(1 - beta2 ** t) / (1 - beta1 ** t)`, as in Kingma and Ba 2015 (arXiv:1412.6980, section 2).

    Source: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, line for FedAdam.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    bias_correction: bool = False

    @property
    def initial_scalars(self) -> Mapping[str, float]:
        """Count the steps when the bias is corrected."""
        return {"step_count": 0.0} if self.bias_correction else NOTHING

    def advance(self, scalars: Mapping[str, float]) -> Mapping[str, float]:
        """Count this step."""
        if not self.bias_correction:
            return scalars
        return {**scalars, "step_count": scalars["step_count"] + 1.0}

    def rate(self, scalars: Mapping[str, float]) -> float:
        """Return the learning rate, corrected for the zero start of the moments if asked."""
        if not self.bias_correction:
            return self.learning_rate
        count = scalars["step_count"]
        correction = sqrt(1.0 - self.beta2**count) / (1.0 - self.beta1**count)
        return float(self.learning_rate * correction)

    def second_moment(self, previous: Vector, squared: Vector) -> Vector:
        """Decay `v` towards the squared aggregate."""
        return self.beta2 * previous + (1.0 - self.beta2) * squared
