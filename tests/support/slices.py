"""A divided pass that a test begins itself, in the place of a leader, and looks at from the database."""

from dataclasses import dataclass

import numpy as np
from sqlalchemy import select

from qflare.tensors.vectors import float_count
from qflare_server.aggregation.fold import Division, RoundFold
from qflare_server.aggregation.pass_inputs import FORMAT, PassInputs
from qflare_server.aggregation.plan import read_plan
from qflare_server.aggregation.slice_results import read_result
from qflare_server.context import Context
from qflare_server.storage.ids import payload_name
from qflare_server.storage.repository import fold_slices, updates
from qflare_server.storage.repository.fold_slices import FoldPass
from qflare_server.storage.tables import FoldSlice
from qflare_server.strategies import PassName
from qflare_server.strategies.blocks import BLOCK, blocks

LEADER = "leader"


@dataclass(frozen=True)
class BegunPass:
    """A pass over the updates of round 1 that was recorded, but that no leader waits for."""

    context: Context
    fold: RoundFold
    found: FoldPass
    bounds: list[tuple[int, int]]

    @classmethod
    def begin(
        cls, context: Context, session_id: str, *, name: PassName = "aggregate", size: int = BLOCK
    ) -> "BegunPass":
        """Begin a pass over all accepted updates, cut into slices of a number of elements."""
        with context.database.read() as session:
            plan = read_plan(session, session_id, 1, 0)
            accepted = updates.accepted_after(session, session_id, 1, 0, 1000)
        fold = RoundFold(context, plan, division=Division(None, 0))
        fold.take(accepted)
        judgements = fold.outcome.judgements
        inputs = PassInputs.of(
            name, plan, fold.revision, fold.last_sequence, fold.sources, judgements
        )
        found = FoldPass(payload_name(), session_id, 1, name, inputs.to_json())
        bounds = list(blocks(float_count(plan.manifest), size))
        at = context.clock()
        context.database.write(
            lambda session: fold_slices.begin_pass(session, found, LEADER, FORMAT, bounds, at)
        )
        return cls(context, fold, found, bounds)

    def rows(self) -> list[FoldSlice]:
        """Return the slices in order."""
        with self.context.database.read() as session:
            query = select(FoldSlice).where(FoldSlice.pass_id == self.found.id)
            return list(session.scalars(query.order_by(FoldSlice.slice_index)))

    def unfinished(self) -> list[FoldSlice]:
        """Return the slices without a result."""
        return [row for row in self.rows() if row.payload_id is None]

    def results(self) -> np.ndarray:
        """Return the recorded results, one after the other."""
        parts = []
        for index, (start, stop) in enumerate(self.bounds):
            with self.context.database.read() as session:
                result = fold_slices.result_of(session, self.found.id, index)
            assert result is not None
            parts += list(read_result(self.context, self.found.inputs, start, stop, result))
        return np.concatenate(parts)

    def alone(self) -> np.ndarray:
        """Return what one coordinator computes alone."""
        count = self.bounds[-1][1]
        parts = self.fold.compute(self.found.name, 0, count)  # type: ignore[arg-type]
        return np.concatenate([part.ravel() for part in parts])

    def end(self) -> None:
        """End the pass as its leader does."""
        self.context.database.write(lambda session: fold_slices.end_pass(session, self.found.id))
