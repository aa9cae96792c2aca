"""A strategy: one rule with its safeguards, its server optimizer and its privacy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qflare_server.strategies.interfaces import (
    NOTHING,
    CohortRule,
    FoldRule,
    Screen,
    ServerOptimizer,
)
from qflare_server.strategies.privacy import CentralPrivacy
from qflare_server.strategies.server_optimizers import PlainStep

DIRECTION = "direction"
"""Name of the state vector that holds the previous aggregate."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """Strategy that turns the updates of a round into a version. Pure: it holds settings, no data.

    Attributes:
        name: The rule's name, for lineage.
        rule: How updates become one aggregate.
        screens: Applied in this order; the first refusal decides, factors multiply.
        optimizer: How the aggregate becomes a version.
        privacy: Noise, or None. Its clipping is the last of the screens.
        device_settings: Numbers sent to every device with its task, such as `proximal_mu`.
    """

    name: str
    rule: FoldRule | CohortRule
    screens: tuple[Screen, ...] = ()
    optimizer: ServerOptimizer = field(default_factory=PlainStep)
    privacy: CentralPrivacy | None = None
    device_settings: Mapping[str, float] = field(default_factory=lambda: NOTHING)

    @property
    def folds(self) -> bool:
        """Whether updates can be folded on arrival and need not be read again at the end."""
        return isinstance(self.rule, FoldRule)

    @property
    def minimum_count(self) -> int:
        """Fewest accepted updates a version can be made from."""
        return 1 if isinstance(self.rule, FoldRule) else self.rule.minimum_count

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of every update has to be known."""
        rule_needs = isinstance(self.rule, FoldRule) and self.rule.needs_norm
        return rule_needs or any(screen.needs_norm for screen in self.screens)

    @property
    def needs_direction(self) -> bool:
        """Whether the previous aggregate has to be kept."""
        return any(screen.needs_direction for screen in self.screens)

    @property
    def initial_vectors(self) -> Mapping[str, float]:
        """State vectors the engine persists with every version, with their initial values."""
        vectors = dict(self.optimizer.initial_vectors)
        return {**vectors, DIRECTION: 0.0} if self.needs_direction else vectors

    @property
    def initial_scalars(self) -> Mapping[str, float]:
        """Numbers the engine persists with every version, with their initial values."""
        privacy = self.privacy.initial_scalars if self.privacy else NOTHING
        return {**self.optimizer.initial_scalars, **privacy}
