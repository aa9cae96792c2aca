"""Aggregation rules, from updates to a version: pure numpy, no I/O.

    strategy = build(StrategyConfig(name="fedavg", quorum=3))
    aggregation = begin(strategy, element_count, base, prior)
    for contribution in accepted:          # in acceptance order
        aggregation.add(contribution)
    for piece in aggregation.finish():     # VersionSlice by VersionSlice
        ...
    aggregation.outcome                    # facts for the lineage

`types` holds the data types, `interfaces` the base classes of rules, screens and server optimizers, `catalogue` the
names, and `testkit` the checks for a strategy of your own.
"""

from qflare_server.strategies.accumulator import Accumulator, SpareTotal
from qflare_server.strategies.catalogue import begin, build
from qflare_server.strategies.config import PrivacyConfig, StrategyConfig
from qflare_server.strategies.culprits import first_excess, whole
from qflare_server.strategies.errors import (
    NotEnoughUpdatesError,
    PrivacyBudgetExceededError,
    StrategyConfigError,
    StrategyError,
)
from qflare_server.strategies.interfaces import (
    Cohort,
    CohortRule,
    FoldRule,
    Screen,
    ServerOptimizer,
    SliceRule,
)
from qflare_server.strategies.serialization import (
    OutcomeEncoder,
    by_update,
    outcome_from_data,
    outcome_to_data,
)
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.types import (
    REVISION,
    Aggregation,
    Compute,
    Contribution,
    Facts,
    Outcome,
    PassName,
    PassRunner,
    Prior,
    Reader,
    UpdateAssessment,
    VersionSlice,
)

Judgement = UpdateAssessment
"""Earlier name of `UpdateAssessment`, for plug-ins that import it."""

__all__ = [
    "REVISION",
    "Accumulator",
    "Aggregation",
    "Cohort",
    "CohortRule",
    "Compute",
    "Contribution",
    "Facts",
    "FoldRule",
    "Judgement",
    "NotEnoughUpdatesError",
    "Outcome",
    "OutcomeEncoder",
    "PassName",
    "PassRunner",
    "Prior",
    "PrivacyBudgetExceededError",
    "PrivacyConfig",
    "Reader",
    "Screen",
    "ServerOptimizer",
    "SliceRule",
    "SpareTotal",
    "Strategy",
    "StrategyConfig",
    "StrategyConfigError",
    "StrategyError",
    "UpdateAssessment",
    "VersionSlice",
    "begin",
    "build",
    "by_update",
    "first_excess",
    "outcome_from_data",
    "outcome_to_data",
    "whole",
]
