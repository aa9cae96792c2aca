"""Passes over all updates, divided by slices among several aggregations, give the bytes of one that does them alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare_server.strategies import (
    Contribution,
    Prior,
    StrategyConfig,
    UpdateAssessment,
    begin,
    build,
)
from qflare_server.strategies.blocks import BLOCK, blocks
from qflare_server.strategies.strategy import Strategy
from qflare_server.strategies.testkit import Sample, reader_of, sample
from qflare_server.strategies.types import Compute, PassName

COUNT = 2 * BLOCK + 777
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "clipped": {"name": "fedavg", "clip_norm": 0.5},
    "fedadam": {},
    "median": {},
    "bounded median": {"name": "median", "max_norm": 3.0},
    "clipped krum": {"name": "krum", "clip_norm": 0.5},
    "directed median": {"name": "median", "min_cosine": 0.02},
    "trimmed_mean": {},
    "krum": {},
    "multi_krum": {},
    "bulyan": {},
    "geometric_median": {},
}


class Others:
    """Other processes: of each slice, an aggregation of its own that knows the judgements only."""

    def __init__(self, strategy: Strategy, data: Sample, full: bool, blocks_each: int) -> None:
        self._strategy = strategy
        self._data = data
        self._full = full
        self._size = blocks_each * BLOCK
        self.names: list[PassName] = []

    def run(
        self, name: PassName, judgements: Sequence[UpdateAssessment], _compute: Compute
    ) -> Iterator[NDArray[np.float64]]:
        self.names.append(name)
        recorded = {entry.update_id: entry for entry in judgements}
        for start, stop in blocks(COUNT, self._size):
            other = begin(
                self._strategy,
                COUNT,
                reader_of(self._data.base),
                prior_of(self._data),
                thread_count=2,
                recorded=recorded,
                resident_bytes=0,
                slice_elements=BLOCK,
            )
            other.extend(updates_of(self._data, self._full))
            pieces = [piece.ravel() for piece in other.compute(name, start, stop)]
            yield np.concatenate(pieces)


def prior_of(data: Sample) -> Prior:
    """Return a previous aggregate that some updates are closer to than others."""
    return Prior(vectors={"direction": reader_of(data.deltas[0].astype(np.float64))})


def updates_of(data: Sample, full: bool) -> list[Contribution]:
    deltas = data.contributions()
    if not full:
        return deltas
    return [
        replace(update, full_weights=True, read=reader_of(data.base + delta))
        for update, delta in zip(deltas, data.deltas, strict=True)
    ]


@pytest.mark.parametrize("full", [False, True], ids=["deltas", "weights"])
@pytest.mark.parametrize("blocks_each", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_divided_passes_change_no_bit(rule: str, blocks_each: int, full: bool) -> None:
    strategy = build(StrategyConfig.from_mapping({"name": rule, "quorum": 7, **RULES[rule]}))
    data = sample(update_count=7, element_count=COUNT)
    alone = begin(strategy, COUNT, reader_of(data.base), prior_of(data))
    alone.extend(updates_of(data, full))
    others = Others(strategy, data, full, blocks_each)
    divided = begin(
        strategy, COUNT, reader_of(data.base), prior_of(data), resident_bytes=0, runner=others
    )
    divided.extend(updates_of(data, full))

    expected = np.concatenate([piece.weights for piece in alone.finish()])
    made = np.concatenate([piece.weights for piece in divided.finish()])

    assert made.tobytes() == expected.tobytes()
    assert divided.outcome == alone.outcome
    assert others.names[-1] == "aggregate"
    assert ("norms" in others.names) == (
        rule in {"bounded median", "clipped krum", "directed median"}
    )
