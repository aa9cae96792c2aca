"""A device's policy for queries of federated analytics: what may be asked of it, whatever the coordinator says.

    policy = Analytics(columns={"age": {"histogram", "mean"}}, min_cohort=10, max_epsilon=1.0, budget=5.0)
    client = Client(home="device", analytics=policy)

A client without a policy answers no query. With one it refuses every query of another column or kind, with fewer
answers in a sum, with less noise, or that would exceed the budget: before it computes anything, and in queries with
neighbors before it advertises keys to a group, and again before each later step.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from qflare.analytics.queries import KINDS, MAX_EXAMPLES
from qflare_client import arguments
from qflare_client.errors import InsufficientTaskError, InvalidArgumentError
from qflare_client.privacy import MAX_EPSILON
from qflare_client.tasks import AnalyticsTask, Task

_MAX_COHORT: Final = 1_000_000
_MAX_BUDGET: Final = 1e6


@dataclass(frozen=True)
class Analytics:
    """What a device requires of a query of federated analytics."""

    columns: Mapping[str, Collection[str]]
    """Kinds of queries that are answered, by column: count, sum, mean, histogram, quantiles, labels."""

    min_cohort: int
    """Fewest answers that are added up with this device's before anybody sees a number, 2 or more: those of the result
    or, with neighbors, of the group, whose exact sum the coordinator gets."""

    max_epsilon: float
    """Largest epsilon of a query, above 0."""

    max_delta: float = 1e-5
    """Largest delta of a query, within (0, 1)."""

    budget: float = math.inf
    """Largest sum of the epsilons of all queries that this device answers, above 0."""

    max_examples: int = 1
    """Largest number of values that this device may count as in a query, 1 or more."""

    allow_unmasked: bool = False
    """Whether the coordinator may read this device's answers, in queries without secure aggregation."""

    def __post_init__(self) -> None:
        """Refuse values that require nothing.

        Raises:
            InvalidArgumentError: A field is out of range, or a kind is unknown.
        """
        arguments.whole("min_cohort", self.min_cohort, 2, _MAX_COHORT)
        arguments.whole("max_examples", self.max_examples, 1, MAX_EXAMPLES)
        arguments.flag("allow_unmasked", self.allow_unmasked)
        arguments.positive("max_epsilon", self.max_epsilon, MAX_EPSILON)
        if not _is_unlimited(self.budget):
            arguments.positive("budget", self.budget, _MAX_BUDGET)
        if not 0 < arguments.number("max_delta", self.max_delta) < 1:
            raise InvalidArgumentError(f"max_delta: got {self.max_delta}, want within (0, 1)")
        object.__setattr__(self, "columns", _columns(self.columns))

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a policy from a TOML file with the fields of this class; `columns` is a table of lists.

        Raises:
            InvalidArgumentError: The file cannot be read, or has an unknown or invalid entry.
        """
        required = {"columns", "min_cohort", "max_epsilon"}
        return cls(**arguments.policy(path, cls.__dataclass_fields__, required))

    def require(self, task: Task) -> None:
        """Refuse a query that this policy does not allow, except for the budget.

        Raises:
            InsufficientTaskError: It does not; the message says in what.
        """
        asked = task.analytics
        if asked is None:
            raise InsufficientTaskError("the task is no query of federated analytics")
        query = asked.query
        if query.kind not in self.columns.get(query.column, ()):
            raise InsufficientTaskError(
                f"a query of kind {query.kind} on column {query.column!r} may not be answered by this device"
            )
        if query.max_examples > self.max_examples:
            raise InsufficientTaskError(
                f"the query lets a device count as {query.max_examples} values; this device allows {self.max_examples}"
            )
        if task.masking is None and not self.allow_unmasked:
            raise InsufficientTaskError(
                "the coordinator would read this device's answer, which it does not allow"
            )
        self._require_cohort(task, asked)
        self._require_noise(asked)

    def _require_cohort(self, task: Task, asked: AnalyticsTask) -> None:
        # With masks, the result of a query may have more answers than the smallest sum that the coordinator sees.
        cohort = asked.min_cohort if task.masking is None else task.masking.min_cohort
        if cohort < self.min_cohort:
            raise InsufficientTaskError(
                f"the query allows sums of {cohort} answers; this device requires {self.min_cohort}"
            )

    def _require_noise(self, asked: AnalyticsTask) -> None:
        if not 0 < asked.epsilon <= self.max_epsilon:
            raise InsufficientTaskError(
                f"the query has epsilon {asked.epsilon:g}; this device allows {self.max_epsilon:g}"
            )
        if not 0 < asked.delta <= self.max_delta:
            raise InsufficientTaskError(
                f"the query has delta {asked.delta:g}; this device allows {self.max_delta:g}"
            )


def _is_unlimited(value: object) -> bool:
    return isinstance(value, float) and value == math.inf


def _columns(value: object) -> dict[str, frozenset[str]]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(
            f"columns: got {type(value).__name__}, want a mapping of columns to kinds"
        )
    found = {}
    for name, kinds in value.items():
        column = arguments.text("columns", name)
        if isinstance(kinds, str) or not isinstance(kinds, Collection):
            raise InvalidArgumentError(f"columns: {column[:100]!r} wants a collection of kinds")
        if not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
            raise InvalidArgumentError(
                f"columns: {column[:100]!r}: got {sorted(map(str, kinds))!r}, want of {', '.join(KINDS)}"[
                    :300
                ]
            )
        found[column] = frozenset(kinds)
    return found
