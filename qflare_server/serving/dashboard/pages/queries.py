"""Queries of federated analytics: the list, and the result of one as figures, a chart and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

import numpy as np

from qflare.analytics.queries import Query
from qflare.analytics.results import Cell, NoisySum
from qflare.v1 import training_pb2
from qflare_server.serving.dashboard.charts import Chart, Part, Series, bar_chart, line_chart
from qflare_server.serving.dashboard.formatting import NONE, Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages.training import shown_devices, shown_groups
from qflare_server.storage.records import GlobalModel, TrainingSession
from qflare_server.storage.repository.neighbors import GroupProgress
from qflare_server.training.analytics import is_query

ROWS: Final = 25
MOST_BARS: Final = 60
"""Bars of a chart; with more bins, neighbors are added up."""
MOST_ROWS: Final = 100
"""Rows of the table; the rest is for `qflare-admin analytics show`."""
NARROW_BARS: Final = 30
SINGLE_ANSWERS: Final = {
    training_pb2.SECURE_AGGREGATION_MODE_UNSPECIFIED: "read by the coordinator",
    training_pb2.SECURE_AGGREGATION_MODE_HELPER: "masked, with helpers",
    training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS: "masked, in groups",
}
"""What the coordinator learns of single answers, by mode of secure aggregation."""


@dataclass(frozen=True)
class QueryRow:
    """A query in the list."""

    session_id: str
    name: str
    kind: str
    column: str
    state: str
    min_answers: int
    single_answers: str
    epsilon: float
    created: Moment | None


@dataclass(frozen=True)
class ShownResult:
    """The result of a query on its page.

    Attributes:
        kind: Kind of the query.
        column: Column of the query.
        figures: Name and value of each number of a result with one row.
        chart: The picture of a result with several rows; None without a finite value.
        columns: Headings of the table.
        rows: Rows of the table, at most `MOST_ROWS`.
        more_count: Rows that are not shown.
        answers: Number of answers.
        epsilon: Of the result.
        delta: Of the result.
        error: Standard deviation of the noise, formatted.
        groups: How many groups are in the result and how many were aborted; empty without neighbors.
        devices: How many devices of the groups came how far; empty without neighbors.
        min_cohort: Fewest answers in a sum.
    """

    kind: str
    column: str
    figures: Sequence[tuple[str, str]]
    chart: Chart | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    more_count: int
    answers: int
    epsilon: float | None
    delta: float
    error: str
    groups: str
    devices: str
    min_cohort: int


def build_list(visit: PageContext) -> Mapping[str, Any]:
    """Build the list of queries."""
    page = visit.use_cases.training.list_queries(visit.rows(ROWS))
    return {
        "rows": [_row(row, visit) for row in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
    }


def _row(row: TrainingSession, visit: PageContext) -> QueryRow:
    query = Query.from_proto(row.config.analytics)
    return QueryRow(
        session_id=row.id,
        name=row.name,
        kind=query.kind,
        column=query.column,
        state=row.state,
        min_answers=row.config.rounds.quorum,
        single_answers=SINGLE_ANSWERS[row.config.secure_aggregation.mode],
        epsilon=row.config.privacy.epsilon_budget,
        created=moment(row.created_at, visit.at),
    )


def result_of(row: TrainingSession, visit: PageContext) -> ShownResult | None:
    """Return the result of a query; None without one, and for sessions that train a model."""
    if not is_query(row.config):
        return None
    found = visit.use_cases.query_results.find(row)
    if found is None:
        return None
    progress = visit.use_cases.training.group_progress(row.id, [found[0].round_number])
    return _shown(row, *found, progress.get(found[0].round_number))


def _shown(
    row: TrainingSession, model: GlobalModel, answers: NoisySum, groups: GroupProgress | None
) -> ShownResult:
    result, query = answers.result(), answers.query
    is_single = len(result.rows) == 1 and query.kind not in {"quantiles", "labels"}
    return ShownResult(
        kind=query.kind,
        column=query.column,
        figures=[
            (name, written(cell))
            for name, cell in zip(result.columns, result.rows[0], strict=True)
            if is_single
        ],
        chart=None if is_single else _chart(query, result.rows),
        columns=result.columns,
        rows=[list(map(written, cells)) for cells in result.rows[:MOST_ROWS]],
        more_count=max(0, len(result.rows) - MOST_ROWS),
        answers=model.participant_count,
        epsilon=model.epsilon,
        delta=row.config.privacy.delta,
        error=written(result.error),
        groups=shown_groups(groups),
        devices=shown_devices(groups),
        min_cohort=row.config.secure_aggregation.min_cohort,
    )


def written(cell: Cell) -> str:
    """Return a cell of a result as text; numbers that are not finite as a dash."""
    if isinstance(cell, str):
        return cell
    return f"{cell:,.6g}" if isfinite(cell) else NONE


def _chart(query: Query, rows: Sequence[Sequence[Cell]]) -> Chart | None:
    if query.kind == "quantiles":
        points = [(float(cells[0]) * 100, float(cells[1])) for cells in rows]
        return line_chart(
            "result",
            f"Quantiles of {query.column}",
            [Series("Value", "measured", points)],
            x_label="Quantile (%)",
            y_label="Value",
            written=written,
        )
    bars = _bars(rows) if query.kind == "histogram" else _labels(rows)
    highest = max(bars, key=lambda bar: bar[1])
    return bar_chart(
        "result",
        f"Values of {query.column}",
        f"{len(bars)} bars; the highest is {highest[0]} with {written(highest[1])}.",
        [(name, [Part("Count", "took-part", count)]) for name, count in bars],
        x_label="Value" if query.kind == "histogram" else "Label",
        y_label="Count, with noise",
        written=written,
        compact_count=NARROW_BARS if query.kind == "labels" else MOST_BARS,
    )


def _bars(rows: Sequence[Sequence[Cell]]) -> list[tuple[str, float]]:
    """Return name and count of bars of a histogram: below the bounds, groups of bins, above the bounds."""
    inner = rows[1:-1]
    step = -(-len(inner) // (MOST_BARS - 2))
    bars = [(f"below {written(rows[0][1])}", float(rows[0][2]))]
    for start in range(0, len(inner), step):
        group = inner[start : start + step]
        name = f"{written(group[0][0])} to {written(group[-1][1])}"
        bars.append((name, float(np.sum([float(cells[2]) for cells in group]))))
    return [*bars, (f"above {written(rows[-1][0])}", float(rows[-1][2]))]


def _labels(rows: Sequence[Sequence[Cell]]) -> list[tuple[str, float]]:
    """Return name and count of the labels, the most frequent ones where there are too many."""
    bars = [(str(cells[0]), float(cells[1])) for cells in rows]
    most = sorted(bars, key=lambda bar: bar[1], reverse=True)[:MOST_BARS]
    return [bar for bar in bars if bar in most]
