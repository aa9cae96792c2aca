"""Totals over the contributors of a version."""

from dataclasses import dataclass, field

from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.training.reported_metrics import Means


@dataclass
class Totals:
    """Totals over a version's contributors, added up in acceptance order.

    Attributes:
        example_count: Their examples.
        largest: The one that counts as most examples, the earliest of equals; None without any.
        metrics: What their devices reported.
    """

    example_count: int = 0
    largest: AcceptedUpdate | None = None
    metrics: Means = field(default_factory=Means)
    _most_examples: int = 0

    def add(self, update: AcceptedUpdate, weight: int) -> None:
        """Count one update.

        Args:
            update: Its stated examples add to `example_count`.
            weight: Number of examples that it counts as.
        """
        self.example_count += update.example_count
        self.metrics.add(update.metrics, weight)
        if weight > self._most_examples:
            self.largest, self._most_examples = update, weight
