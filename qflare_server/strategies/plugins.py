"""Plug-in rules from other distributions, found by entry point.

A distribution declares, in group `qflare.strategies`, a name and a callable that takes the `StrategyConfig` and gives a
`FoldRule` or a `CohortRule`; its own numeric settings are in `config.options`. The names of QFLARE's own rules cannot
be taken. Loading an entry point runs its code with the coordinator's rights: install only what you trust, and run
`testkit` on it.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Final

from qflare_server.strategies.config import StrategyConfig
from qflare_server.strategies.errors import StrategyConfigError
from qflare_server.strategies.interfaces import CohortRule, FoldRule

GROUP: Final = "qflare.strategies"

Rule = FoldRule | CohortRule
RuleFactory = Callable[[StrategyConfig], Rule]


def installed_names() -> tuple[str, ...]:
    """Return the names of the rules of other distributions, in order."""
    return tuple(sorted(entry_points(group=GROUP).names))


def load_rule(config: StrategyConfig) -> Rule:
    """Load the entry point named by the configuration and call it.

    Raises:
        StrategyConfigError: There is no such entry point, there are several, it cannot be imported, or it
            gives something else than a rule.
    """
    found = entry_points(group=GROUP, name=config.name)
    if len(found) != 1:
        known = ", ".join(installed_names()) or "none"
        raise StrategyConfigError(
            f"{len(found)} entry points give strategy {config.name!r}; installed: {known}"
        )
    try:
        factory = next(iter(found)).load()
    except (ImportError, AttributeError) as error:
        raise StrategyConfigError(f"strategy {config.name!r} cannot be loaded: {error}") from error
    rule = factory(config)
    if not isinstance(rule, FoldRule | CohortRule):
        raise StrategyConfigError(
            f"strategy {config.name!r} gave a {type(rule).__name__}, not a rule"
        )
    return rule
