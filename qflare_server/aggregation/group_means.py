"""The fold of a round whose rule compares the means of groups, under secure aggregation with neighbors.

A robust rule needs several updates to compare, and single ones are hidden. It gets the mean of each group that was
opened, as if a group were one device: a group with hostile members has a hostile mean at worst, and the rule withstands
as many such groups as it would such updates.

No sum is held: a window of every group's sum is made when the rule reads it, from the stored updates and the masks that
were opened. Memory is a few windows for each group, whatever the model and the number of updates.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

import numpy as np

from qflare.evidence.lineage import contributors_digest
from qflare.masking.masks import Mask
from qflare.masking.quantization import mean_change, slot_totals
from qflare.tensors import CHUNK_BYTES
from qflare_server.aggregation.fold import WrittenVersion, fact_of
from qflare_server.aggregation.neighbor_fold import NeighborRoundFold
from qflare_server.aggregation.readers import stored_payload
from qflare_server.errors import DamagedPayloadError, HelperRefusedError, InvalidUpdateError
from qflare_server.payloads.reader import PayloadBytes, check_digests
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.strategies import Contribution, NotEnoughUpdatesError
from qflare_server.training.neighbor_opening import OpenedGroup

WINDOWS: Final = 2  # of each group: threads read slices on both sides of a boundary


class GroupSum:
    """The unmasked sum of an opened group, made window by window; thread-safe.

    Args:
        sources: Open the masked update of each member.
        masks: Seed and sign of each mask in the sum.
        size: Elements of a masked update.
        dtype: Of the ring's elements.
    """

    def __init__(
        self,
        sources: Sequence[Callable[[], PayloadBytes]],
        masks: Sequence[tuple[bytes, int]],
        size: int,
        dtype: np.dtype[Any],
    ) -> None:
        self._sources = sources
        self._masks = [(Mask(seed), sign) for seed, sign in masks]
        self._size = size
        self._dtype = dtype
        self._length = CHUNK_BYTES // dtype.itemsize
        self._windows: dict[int, np.ndarray[Any, Any]] = {}  # the one that was used last comes last
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "GroupSum(...)"

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return elements `start <= i < stop` of the sum, in the ring.

        Raises:
            DamagedPayloadError: A chunk of an update is missing or altered.
        """
        if start == stop:
            return np.empty(0, self._dtype)
        numbers = range(start // self._length, (stop - 1) // self._length + 1)
        parts = [
            self._window(number)[
                max(0, start - number * self._length) : stop - number * self._length
            ]
            for number in numbers
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window(self, number: int) -> np.ndarray[Any, Any]:
        with self._lock:
            made = self._windows.pop(number, None)
            self._windows[number] = self._make(number) if made is None else made
            for old in list(self._windows)[:-WINDOWS]:
                del self._windows[old]
            return self._windows[number]

    def _make(self, number: int) -> np.ndarray[Any, Any]:
        first = number * self._length
        total = np.zeros(min(self._length, self._size - first), self._dtype)
        for source in self._sources:
            data = source().read(first * self._dtype.itemsize, total.nbytes)
            total += np.frombuffer(data, self._dtype)
        for mask, sign in self._masks:
            if sign > 0:
                mask.subtract_from(total, first)
            else:
                mask.add_to(total, first)
        return total


@dataclass(frozen=True)
class _Group:
    """A group in the version: its number, its sum, and the statements in it."""

    number: int
    total: GroupSum
    digest: str
    weight: int = 0


class GroupMeansFold(NeighborRoundFold):
    """Aggregates the means of the groups of one round; not thread-safe. Arguments as `MaskedRoundFold`."""

    def _begin(self, excluded: Mapping[str, str]) -> None:
        super()._begin(excluded)
        self._folded: dict[str, AcceptedUpdate] = {}
        self._groups: list[_Group] = []

    def _held_elements(self) -> int:
        return 0

    def _take_in(self, update: AcceptedUpdate) -> None:
        check_digests(stored_payload(update))
        self._folded[update.statement_digest] = fact_of(update)

    def _take_out(self, update: AcceptedUpdate) -> None:
        del self._folded[update.statement_digest]

    def _require_quorum(self) -> None:
        super()._require_quorum()
        self._groups = []

    def _remove_masks(self, number: int, group: OpenedGroup) -> None:
        """Keep how the sum of a group is made, instead of making it."""
        names = [member.update_digest.hex() for member in group.transcript.members]
        members = [self._folded[name] for name in names if name]
        total = GroupSum(
            [partial(self._source, update) for update in members],
            list(group.masks()),
            self._element_count + self._parameters.slot_count,
            self._parameters.dtype,
        )
        digest = contributors_digest(self._bound[update.update_id] for update in members)
        self._groups.append(_Group(number, total, digest))

    def _read_totals(self) -> None:
        """Read the weight of each group, and the weighted means of the metrics over all groups."""
        needed, name = self._strategy.minimum_count, self._strategy.name
        if len(self._groups) < needed:
            raise NotEnoughUpdatesError(
                f"{len(self._groups)} groups could be opened, and {name} needs {needed}"
            )
        read = [(group, *self._totals_of(group)) for group in self._groups]
        self._groups = [replace(group, weight=weight) for group, weight, _ in read]
        self._weight_sum = sum(weight for _, weight, _ in read)
        self._means = {
            metric: sum(weight * means[metric] for _, weight, means in read) / self._weight_sum
            for metric in self._parameters.metrics
        }

    def _totals_of(self, group: _Group) -> tuple[int, Mapping[str, float]]:
        count = self._element_count
        slots = group.total.read(count, count + self._parameters.slot_count)
        try:
            return slot_totals(self._parameters, slots)
        except ValueError as error:
            raise InvalidUpdateError(
                f"the unmasked sum of group {group.number}: {error}"
            ) from error

    def write(self, executor: ThreadPoolExecutor, at: datetime) -> WrittenVersion:
        """Write the version's payload from the means of the groups, as `MaskedRoundFold.write`.

        Raises:
            HelperRefusedError: As there; or the stored bytes of an update are damaged, and with them its group.
            DamagedPayloadError: Stored bytes are missing or altered, and (still) not those of updates to be refused.
        """
        try:
            return super().write(executor, at)
        except DamagedPayloadError as error:
            damaged = self._damaged() if self._refuses_damaged else {}
            if not damaged:
                raise
            update_id, reason = next(iter(damaged.items()))
            raise HelperRefusedError(f"update {update_id}: {reason}") from error

    def _contributions(self) -> Sequence[Contribution]:
        """Return what the strategy gets: the mean of each group, in the order of their numbers."""
        return [
            Contribution(
                f"group {group.number}",
                group.weight,
                partial(self._mean, group),
                digest=group.digest,
            )
            for group in self._groups
        ]

    def _mean(self, group: _Group, start: int, stop: int) -> np.ndarray[Any, Any]:
        return mean_change(self._parameters, group.total.read(start, stop), group.weight)
