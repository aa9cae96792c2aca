"""Passes over the updates of a large round, divided among the coordinators on one PostgreSQL database.

When a round has closed, its leader, the coordinator that makes the version, cuts the vector of the model into slices
and records them (`storage.repository.fold_slices`). Every coordinator acquires slices, reads its range of each update
in acceptance order, and stores the result: a part of the aggregate before noise and server step, or of the inner
products of the updates (`strategies.types.PassName`). The leader takes the results in order and goes on as with its
own. Each element, and each block of inner products, is computed as one coordinator alone computes it, so the bytes of
the version are the same for any number of slices and coordinators.

Who computes a slice is decided by leases with a fence, by the clock of the database server: a coordinator that was
killed is replaced once its lease has expired, and one that was frozen cannot record what it computed meanwhile. The
leader computes slices as well, those that it needs next without storing them, so that it depends on nobody: a slice
that another coordinator holds for too long is computed by the leader without a lease.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from qflare.tensors import CHUNK_BYTES
from qflare.tensors.vectors import float_count
from qflare_server.aggregation.fold import Division, RoundFold
from qflare_server.aggregation.pass_inputs import FORMAT, PassInputs
from qflare_server.aggregation.slice_results import LeaseLostError, read_result, store_result
from qflare_server.context import Context
from qflare_server.errors import DamagedPayloadError, PayloadPrunedError, QflareError
from qflare_server.storage.ids import payload_name
from qflare_server.storage.repository import fold_slices, leases
from qflare_server.storage.repository.fold_slices import FoldPass, SliceLease
from qflare_server.strategies import Compute, PassName, UpdateAssessment, accumulator
from qflare_server.strategies.blocks import BLOCK, blocks

logger = logging.getLogger(__name__)

WAIT_S: Final = 0.05
"""Seconds between two looks at a slice that another coordinator computes."""
PATIENCE: Final = 3
"""Lives of a lease after which the leader computes a slice that it waits for without a lease."""
SEEN_S: Final = 60.0
"""Seconds since a coordinator announced itself within which it counts as one that may help."""
CHUNK_ELEMENTS: Final = CHUNK_BYTES // 4
"""Elements of a model in float32 in a chunk of its payload."""

Values = Iterator[NDArray[np.float64]]


def divides(context: Context) -> bool:
    """Return whether large rounds are divided among coordinators: on PostgreSQL, unless it is turned off."""
    return (
        context.config.fold_slice_bytes > 0
        and not context.database.is_sqlite
        and bool(context.state_key)
    )


def has_others(context: Context, holder: str) -> bool:
    """Return whether another coordinator on the database was seen lately."""
    memory_s = max(SEEN_S, 3 * context.config.last_seen_interval_s)
    since = context.clock() - timedelta(seconds=memory_s)
    with context.database.read() as session:
        seen = {replica.id for replica in leases.list_replicas(session, since)}
    return bool(seen - {holder})


class Keeper:
    """Keeps the lease of a slice while it is computed; for one thread.

    Args:
        context: The coordinator's parts.
        lease: The slice.
    """

    def __init__(self, context: Context, lease: SliceLease) -> None:
        self._context = context
        self._lease = lease
        self._life_s = context.config.lease_s
        self._renewed_at = time.monotonic()

    def keep(self) -> None:
        """Renew the lease if a third of its life has passed.

        Raises:
            LeaseLostError: It is another coordinator's now, or its pass has ended.
        """
        now = time.monotonic()
        if now - self._renewed_at < self._life_s / 3:
            return
        self._renewed_at = now
        renewed = partial(fold_slices.renew, lease=self._lease, life_s=self._life_s)
        if not self._context.database.write(renewed):
            raise LeaseLostError


@dataclass(frozen=True)
class PassDivider:
    """Divides the passes of rounds that this coordinator leads.

    Attributes:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        holder: Name of this coordinator.
        stay_leader: Renews the lease of a training session, without which another coordinator begins the round again.
    """

    context: Context
    executor: ThreadPoolExecutor
    holder: str
    stay_leader: Callable[[str], object]

    def division(self) -> Division | None:
        """Return how folds are divided; None if they are not."""
        if not divides(self.context):
            return None
        resident_bytes = min(accumulator.RESIDENT_BYTES, self.context.config.fold_slice_bytes)
        return Division(partial(_Runner, self), resident_bytes)


@dataclass(frozen=True)
class _Runner:
    """Divides the passes of one fold (`strategies.types.PassRunner`)."""

    divider: PassDivider
    fold: RoundFold

    def run(
        self, name: PassName, judgements: Sequence[UpdateAssessment], compute: Compute
    ) -> Values | None:
        """Yield the results of a pass; None if it is too small, or no other coordinator is there."""
        bounds = self._bounds(len(judgements))
        if len(bounds) <= 1 or not has_others(self.divider.context, self.divider.holder):
            return None
        fold = self.fold
        inputs = PassInputs.of(
            name, fold.plan, fold.revision, fold.last_sequence, fold.sources, judgements
        )
        found = FoldPass(
            payload_name(),
            fold.plan.training_session_id,
            fold.plan.number,
            name,
            inputs.to_json(),
        )
        logger.info(
            "pass divided: session=%s round=%d pass=%s slices=%d",
            found.training_session_id,
            found.round_number,
            name,
            len(bounds),
        )
        return _DividedPass(self.divider, fold, found, bounds, compute).values()

    def _bounds(self, update_count: int) -> list[tuple[int, int]]:
        """Cut the vector into slices of about `fold_slice_bytes` of all updates together (`slice_elements`)."""
        count = float_count(self.fold.plan.manifest)
        total_bytes = update_count * self.fold.update_bytes
        slice_count = max(1, -(-total_bytes // self.divider.context.config.fold_slice_bytes))
        return list(blocks(count, slice_elements(count, slice_count)))


def slice_elements(element_count: int, slice_count: int) -> int:
    """Return the length of slices that cut a vector into about as many as are wanted, a multiple of `BLOCK`.

    Slices as long as a chunk of float32 values are multiples of it: a chunk that two of them shared would be read and
    hashed twice.
    """
    length = BLOCK * max(1, -(-element_count // (BLOCK * slice_count)))
    return length if length < CHUNK_ELEMENTS else -(-length // CHUNK_ELEMENTS) * CHUNK_ELEMENTS


@dataclass(frozen=True)
class _DividedPass:
    """A pass under way; for the leader's thread."""

    divider: PassDivider
    fold: RoundFold
    found: FoldPass
    bounds: Sequence[tuple[int, int]]
    compute: Compute
    _waiting: threading.Event = field(default_factory=threading.Event)  # is never set

    @property
    def _context(self) -> Context:
        return self.divider.context

    def values(self) -> Values:
        """Yield the results of all slices in order."""
        self._end_earlier()
        at = self._context.clock()
        self._context.database.write(
            lambda session: fold_slices.begin_pass(
                session, self.found, self.divider.holder, FORMAT, self.bounds, at
            )
        )
        try:
            for index in range(len(self.bounds)):
                yield from self._slice(index)
        finally:
            self._end()

    def _end_earlier(self) -> None:
        """End passes of the round that an earlier leader has left."""
        session_id, number = self.found.training_session_id, self.found.round_number
        self._try(lambda session: fold_slices.end_earlier(session, session_id, number))

    def _end(self) -> None:
        self._try(lambda session: fold_slices.end_pass(session, self.found.id))

    def _try(self, ending: Callable[[Session], None]) -> None:
        """End passes; those whose rows a frozen coordinator has locked are ended by maintenance."""
        try:
            self._context.database.write(ending)
        except QflareError as error:
            logger.warning("divided pass not ended: %s", error)

    def _slice(self, index: int) -> Values:
        """Yield the result of a slice, its own or another coordinator's."""
        deadline = time.monotonic() + PATIENCE * self._context.config.lease_s
        while time.monotonic() < deadline:
            self.divider.stay_leader(self.found.training_session_id)
            values = self._recorded(index)
            if values is not None:
                yield from values
                return
            lease = self._acquire(index)
            if lease is None:
                if not self._is_under_way():
                    break
                self._waiting.wait(WAIT_S)
            elif lease.slice_index == index:
                yield from self._leased(lease)
                return
            else:
                self._store(lease)
                deadline = time.monotonic() + PATIENCE * self._context.config.lease_s
        yield from self.compute(*self.bounds[index])

    def _recorded(self, index: int) -> Values | None:
        """Return what yields a recorded result; None if there is none, or it cannot be used."""
        with self._context.database.read() as session:
            result = fold_slices.result_of(session, self.found.id, index)
        if result is None:
            return None
        try:
            return read_result(self._context, self.found.inputs, *self.bounds[index], result)
        except (DamagedPayloadError, PayloadPrunedError) as error:
            logger.warning("result of a slice not used: %s", error)
            return self.compute(*self.bounds[index])

    def _acquire(self, index: int) -> SliceLease | None:
        """Acquire the slice that is needed next, or the first free one after it."""
        life_s, holder = self._context.config.lease_s, self.divider.holder

        def work(session: Session) -> SliceLease | None:
            return fold_slices.acquire_of(session, self.found.id, index, holder, life_s)

        return self._context.database.write(work)

    def _leased(self, lease: SliceLease) -> Values:
        """Yield the result of a slice that is needed next, without storing it."""
        keeper = Keeper(self._context, lease)
        for part in self.compute(lease.first_element, lease.end_element):
            yield part
            self.divider.stay_leader(self.found.training_session_id)
            try:
                keeper.keep()
            except LeaseLostError:  # another one computes the same bytes
                continue

    def _store(self, lease: SliceLease) -> None:
        """Compute a slice that is needed later."""
        values = self.compute(lease.first_element, lease.end_element)
        keep = Keeper(self._context, lease).keep
        try:
            store_result(
                self._context,
                self.divider.executor,
                self.fold.plan,
                self.found,
                lease,
                values,
                keep,
            )
        except LeaseLostError:
            logger.info("slice %d is another coordinator's now", lease.slice_index)

    def _is_under_way(self) -> bool:
        with self._context.database.read() as session:
            return fold_slices.is_under_way(session, self.found.id)
