"""Exceptions of the strategies.

They are independent of gRPC and of the database; the caller translates them.
"""


class StrategyError(Exception):
    """Base class; the message states the value found and the value required."""


class StrategyConfigError(StrategyError, ValueError):
    """A configuration names something unknown, is out of range or contradicts itself."""


class NotEnoughUpdatesError(StrategyError):
    """Fewer updates were accepted than the rule needs, or their weights add up to zero."""


class PrivacyBudgetExceededError(StrategyError):
    """Releasing this version would exceed the privacy budget of the training session."""


class StrategyContractError(StrategyError, AssertionError):
    """A strategy violates its contract; raised by the test kit only."""
