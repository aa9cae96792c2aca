"""The kind of fold that a round needs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qflare_server.aggregation.fold import Division, RoundFold
from qflare_server.aggregation.group_means import GroupMeansFold
from qflare_server.aggregation.masked_fold import MaskedRoundFold
from qflare_server.aggregation.neighbor_fold import NeighborRoundFold
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.context import Context
from qflare_server.training.masking import compares_groups, is_masked
from qflare_server.training.neighbor_stages import has_neighbors


def open_fold(
    context: Context,
    plan: RoundPlan,
    *,
    asker: Callable[[], ThreadPoolExecutor] | None = None,
    division: Division | None = None,
    **settings: Any,
) -> RoundFold:
    """Return the fold of a round.

    Args:
        context: The coordinator's parts.
        plan: The round's aggregation plan.
        asker: Returns the threads that unmask sums; None does it in the caller's thread when the version is written.
        division: As of `RoundFold`; sums of masked updates are not divided.
        settings: As of `RoundFold`.
    """
    if has_neighbors(plan.config):
        kind = GroupMeansFold if compares_groups(plan.config) else NeighborRoundFold
        return kind(context, plan, asker=asker, **settings)
    if is_masked(plan.config):
        return MaskedRoundFold(context, plan, asker=asker, **settings)
    return RoundFold(context, plan, division=division, **settings)
