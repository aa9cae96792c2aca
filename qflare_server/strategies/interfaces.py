"""Base classes of screens, rules and server optimizers, with the contract of each.

    updates -> screens -> rule -> aggregate (+ noise) -> server optimizer -> version

* A **screen** refuses an update or scales it down, from the facts of that update alone.
* A **rule** turns the updates into one aggregate delta. A *fold rule* is a weighted mean whose coefficients depend
  on each update's own facts, so the coordinator folds each update on arrival and does not keep it. A *cohort rule*
  needs all updates at once and works slice by slice.
* A **server optimizer** makes the version from the base version and the aggregate, element by element, and
  keeps named state vectors from version to version.

Every part is a frozen value without clock, file or random source: the same inputs give the same bytes. Derive your own
parts from these classes; `testkit` checks the contract.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.types import Facts, Vector

NOTHING: Mapping[str, float] = MappingProxyType({})


class Screen(ABC):
    """A safeguard that judges each update separately.

    Attributes:
        needs_norm: Whether `judge` reads `Facts.norm`.
        needs_direction: Whether `judge` reads `Facts.cosine`; then the aggregate of every version is kept as
            the state vector `direction`.
    """

    needs_norm: ClassVar[bool] = False
    needs_direction: ClassVar[bool] = False

    @abstractmethod
    def judge(self, facts: Facts, scalars: Mapping[str, float]) -> tuple[float, str]:
        """Return a factor within [0, 1] for the delta, and the reason for refusing it or an empty text.

        Args:
            facts: The update's facts.
            scalars: Scalars persisted with the base version.
        """


class FoldRule(ABC):
    """A weighted mean: sum of `coefficient * delta` over sum of `weight`.

    Attributes:
        needs_norm: Whether `share` reads `Facts.norm`.
    """

    needs_norm: ClassVar[bool] = False

    @abstractmethod
    def share(self, facts: Facts) -> tuple[float, float]:
        """Return the coefficient and the weight of one update, both finite and zero or more.

        They depend on this update's facts only, so updates can be folded on arrival.
        """


@dataclass(frozen=True, slots=True)
class Cohort:
    """Input of a cohort rule's plan.

    Attributes:
        facts: Of the accepted updates, `k` of them, in acceptance order.
        gram: Inner products of the scaled deltas, shape (k, k), when the rule asked for it.
    """

    facts: tuple[Facts, ...]
    gram: NDArray[np.float64] | None = None


class CohortRule(ABC):
    """A rule over all updates of a round: a linear combination of the deltas, chosen over the whole cohort.

    Attributes:
        needs_gram: Whether `plan` reads `Cohort.gram`, which costs one more pass over the updates.
        weighs_examples: Whether the rule can weigh updates by example count.
    """

    needs_gram: ClassVar[bool] = False
    weighs_examples: ClassVar[bool] = False

    @property
    @abstractmethod
    def minimum_count(self) -> int:
        """Fewest accepted updates the rule is defined for."""

    @abstractmethod
    def plan(self, cohort: Cohort) -> tuple[float, ...]:
        """Return each update's coefficient in the aggregate, before any element is read.

        An update with coefficient zero takes no part and is not read again.

        Args:
            cohort: At least `minimum_count` updates.
        """


class SliceRule(CohortRule):
    """A cohort rule that is no linear combination: it compares the values of each element across updates.

    Its plan gives one to each participating update and zero to the others.

    Attributes:
        translation_equivariant: Whether adding one vector to every update adds it to the aggregate. The
            driver may then combine full weights as they are and subtract the base version once.
    """

    translation_equivariant: ClassVar[bool] = False

    def plan(self, cohort: Cohort) -> tuple[float, ...]:
        """Include every update."""
        return (1.0,) * len(cohort.facts)

    @abstractmethod
    def combine(self, matrix: NDArray[np.floating]) -> Vector:
        """Turn `m` elements of the `s` updates that take part into `m` elements.

        Args:
            matrix: Float32 or float64, shape (s, m), one update a row in acceptance order. The rule may
                overwrite it.

        Returns:
            Float64, shape (m,). Each element depends on its own column only, and is the same in float32
            and float64 when the values are: the driver chooses `m` and the dtype.
        """


class ServerOptimizer(ABC):
    """The step from base version and aggregate to the version."""

    @property
    def initial_vectors(self) -> Mapping[str, float]:
        """State vectors by name, with the value every element has before the first version."""
        return NOTHING

    @property
    def initial_scalars(self) -> Mapping[str, float]:
        """Numbers kept from version to version, with their first values."""
        return NOTHING

    def advance(self, scalars: Mapping[str, float]) -> Mapping[str, float]:
        """Return this version's numbers from those of the base version; called once, before any `step`."""
        return scalars

    @abstractmethod
    def step(
        self,
        base: Vector,
        aggregate: Vector,
        vectors: Mapping[str, Vector],
        scalars: Mapping[str, float],
    ) -> tuple[Vector, Mapping[str, Vector]]:
        """Return the version's weights and state vectors for some elements, each from its own inputs only.

        Args:
            base: Weights of the base version, shape (m,). Not to be written into.
            aggregate: The rule's aggregate, shape (m,). Not to be written into.
            vectors: State vectors of the base version, each of shape (m,). Not to be written into.
            scalars: What `advance` gave.
        """
