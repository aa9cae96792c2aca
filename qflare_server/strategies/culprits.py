"""Attribution of overflow: finds the updates that take a version out of the range of its element types.

Means are linear: if each update alone gives a version in range, so does their mean. When a version is out of range, the
updates that are out of range alone are rejected, and the round is aggregated without them. When no single update is
responsible, what a server optimizer remembers of earlier updates is: those elements keep the base version's value, and
the optimizer forgets them. Without such a memory the model itself has diverged.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qflare_server.strategies.blocks import LARGEST_NORM, blocks, delta_of
from qflare_server.strategies.finalization import Release
from qflare_server.strategies.types import Contribution, UpdateAssessment, Vector, VersionSlice

Fits: TypeAlias = Callable[[int, Vector], NDArray[np.bool_]]
"""`fits(start, weights)` says of each weight from element `start` on whether the model can hold it."""


def first_excess(
    release: Release, contribution: Contribution, judgement: UpdateAssessment, fits: Fits
) -> int | None:
    """Find an element that the version could not hold if it were made of one update alone.

    Elements that leave the range without the update as well, by the momentum of earlier versions, do not count.

    Args:
        release: Finalization of the aggregation that includes the update.
        contribution: The update.
        judgement: Its assessment; only the factor is used, not the share.
        fits: Of the model.

    Returns:
        The first such element; None if there is none.
    """
    element_count = release.assessor.element_count
    for start, stop in blocks(element_count):
        with np.errstate(over="ignore", invalid="ignore"):
            delta = delta_of(contribution, release.assessor.base, start, stop) * judgement.factor
        exceeds = ~(np.abs(delta) <= LARGEST_NORM) | ~whole(release.step(start, stop, delta), fits)
        if exceeds.any():
            exceeds &= whole(release.step(start, stop, np.zeros(stop - start)), fits)
        if exceeds.any():
            return start + int(np.argmax(exceeds))
    return None


def whole(made: VersionSlice, fits: Fits) -> NDArray[np.bool_]:
    """Return for each element whether its weight fits and its state is finite."""
    whole = fits(made.start, made.weights)
    for vector in made.vectors.values():
        whole = whole & np.isfinite(vector)
    return whole
