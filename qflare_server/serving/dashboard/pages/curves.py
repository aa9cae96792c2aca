"""Curves of a training session: any metric by version, device groups, privacy, phases and devices by round."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from qflare.v1 import training_pb2
from qflare_server.serving.dashboard import formatting
from qflare_server.serving.dashboard.charts import (
    SIZES,
    Chart,
    Limit,
    Part,
    Series,
    Size,
    SmallLine,
    bar_chart,
    line_chart,
    small_lines,
)
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository.views import VersionMetrics
from qflare_server.storage.tables import RoundState
from qflare_server.training.objective import objective_of
from qflare_server.training.reported_metrics import TRAINING

MOST_CHOSEN: Final = 8
SHOWN_GROUPS: Final = 12


@dataclass(frozen=True)
class Choice:
    """A metric that can be chosen: `link` shows the page with it chosen, or no longer chosen."""

    name: str
    is_chosen: bool
    link: str


@dataclass(frozen=True)
class Groups:
    """A metric of each device group, and how many groups are not shown."""

    metric: str
    lines: Sequence[SmallLine]
    more_count: int


@dataclass(frozen=True)
class Curve:
    """A metric as a curve, and of each device group."""

    chart: Chart
    groups: Groups


@dataclass(frozen=True)
class Curves:
    """Chosen metrics as curves.

    Attributes:
        held_out: Metrics that devices measured on data that they hold out.
        trained: Metrics that were measured while training only.
        shown: The chosen metrics.
    """

    held_out: Sequence[Choice]
    trained: Sequence[Choice]
    shown: Sequence[Curve]


@dataclass(frozen=True)
class Latest:
    """The newest value of a metric; `data` says what it was measured on."""

    name: str
    value: float
    data: str


def series(metrics: Sequence[VersionMetrics], name: str) -> list[Series]:
    """Return a metric by version: as devices measured it on data they hold out, and as they trained."""
    kinds = (
        ("On held-out data", "measured", name),
        ("While training", "trained", f"{TRAINING}{name}"),
    )
    return [Series(label, css, _points(metrics, key)) for label, css, key in kinds]


def _points(metrics: Sequence[VersionMetrics], key: str) -> list[tuple[float, float]]:
    return [(float(row.version), float(row.metrics[key])) for row in metrics if key in row.metrics]


def latest(metrics: Sequence[VersionMetrics], name: str) -> Latest | None:
    """Return the newest value of a metric, measured on held-out data where there is any such."""
    for key, data in ((name, "held out"), (f"{TRAINING}{name}", "training data only")):
        for row in reversed(metrics):
            if key in row.metrics:
                return Latest(name, float(row.metrics[key]), data)
    return None


def preferred(row: TrainingSession) -> list[str]:
    """Return the metrics that a person looks at first: of the objective, accuracy and loss."""
    return list(dict.fromkeys((objective_of(row.config).metric, "accuracy", "loss")))


def headline(row: TrainingSession, metrics: Sequence[VersionMetrics]) -> list[Latest]:
    """Return the newest values that a person looks at first."""
    return [found for name in preferred(row) if (found := latest(metrics, name)) is not None]


def metric_chart(
    chart: str,
    name: str,
    metrics: Sequence[VersionMetrics],
    config: training_pb2.TrainingConfig,
    sizes: Mapping[str, Size] = SIZES,
) -> Chart | None:
    """Return the curve of a metric with the bounds of the release gate; `chart` is unique on the page."""
    return line_chart(
        chart,
        f"{_heading(name)} by version",
        series(metrics, name),
        x_label="Version",
        y_label="",
        written=lambda value: formatting.metric(value, name),
        sizes=sizes,
        limits=list(_gate(config, name)),
    )


def _heading(name: str) -> str:
    """Return the name of a metric at the beginning of a title: words are capitalized, identifiers are not."""
    return name.capitalize() if name.isalpha() else name


def _gate(config: training_pb2.TrainingConfig, name: str) -> Iterator[Limit]:
    for bound in config.release.bounds:
        if bound.metric != name:
            continue
        if bound.HasField("min_value"):
            text = f"release gate: at least {formatting.metric(bound.min_value, name)}"
            yield Limit(text, bound.min_value)
        if bound.HasField("max_value"):
            text = f"release gate: at most {formatting.metric(bound.max_value, name)}"
            yield Limit(text, bound.max_value)


def build(row: TrainingSession, metrics: Sequence[VersionMetrics], visit: PageContext) -> Curves:
    """Return the curves of the metrics that the query names, by default those that a person looks at first."""
    held_out, trained = names(metrics)
    known = {*held_out, *trained}
    wanted = visit.texts("metric", MOST_CHOSEN) or preferred(row)
    chosen = [name for name in wanted if name in known]
    shown = []
    for place, name in enumerate(chosen):
        chart = metric_chart(_chart_name(name, place), name, metrics, row.config)
        if chart is not None:
            shown.append(Curve(chart, _groups(name, metrics)))
    path = f"/sessions/{row.id}"
    return Curves(
        [_choice(name, chosen, path) for name in held_out],
        [_choice(name, chosen, path) for name in trained],
        shown,
    )


def names(metrics: Sequence[VersionMetrics]) -> tuple[list[str], list[str]]:
    """Return the metrics that are measured on held-out data, and those that are measured while training only."""
    keys = {key for row in metrics for key in row.metrics}
    held_out = {key for key in keys if not key.startswith(TRAINING)}
    trained = {key.removeprefix(TRAINING) for key in keys - held_out}
    return sorted(held_out), sorted(trained - held_out)


def _chart_name(name: str, place: int) -> str:
    """Return the name of a chart: names of metrics may hold any printable text."""
    return name if name in {"accuracy", "loss"} else f"metric-{place}"


def _choice(name: str, chosen: Sequence[str], path: str) -> Choice:
    is_chosen = name in chosen
    others = [item for item in chosen if item != name]
    query = others if is_chosen else [*others, name]
    link = f"{path}?{urlencode([('metric', item) for item in query])}#curves"
    return Choice(name, is_chosen, link)


def _groups(name: str, metrics: Sequence[VersionMetrics]) -> Groups:
    """Return a metric of the device groups, by name of the group."""
    found = sorted({group for row in metrics for group in row.group_metrics})
    lines = [
        Series(
            group or "no group",
            "measured",
            [
                (float(row.version), float(row.group_metrics[group][name]))
                for row in metrics
                if name in row.group_metrics.get(group, {})
            ],
        )
        for group in found
    ]
    lines = [line for line in lines if line.points]
    together = Series("All devices", "measured", _points(metrics, name))
    shown = small_lines(
        lines[:SHOWN_GROUPS], together, lambda value: formatting.metric(value, name)
    )
    return Groups(name, shown, len(lines) - len(shown))


def privacy_chart(row: TrainingSession, metrics: Sequence[VersionMetrics]) -> Chart | None:
    """Return epsilon by version against its budget, None without differential privacy."""
    budget = row.config.privacy.epsilon_budget
    points = [(float(item.version), item.epsilon) for item in metrics if item.epsilon is not None]
    limits = [Limit(f"budget: {formatting.measure(budget)}", budget)] if budget else []
    return line_chart(
        "privacy",
        "Privacy spent by version",
        [Series("Epsilon", "measured", points)],
        x_label="Version",
        y_label="Epsilon (lower is more private)",
        written=formatting.measure,
        limits=limits,
    )


def phases(row: Round, visit: PageContext) -> tuple[float, float | None]:
    """Return how long a round has collected updates, and how long its version took; seconds."""
    collecting = ((row.closed_at or visit.at) - row.opened_at).total_seconds()
    if row.closed_at is None or row.state in {RoundState.FAILED.value, RoundState.CANCELLED.value}:
        return collecting, None
    return collecting, ((row.published_at or visit.at) - row.closed_at).total_seconds()


def phase_chart(rounds: Sequence[Round], visit: PageContext) -> Chart | None:
    """Return how long each phase of the latest rounds took, on a scale on which short ones are seen."""
    ended = [row for row in reversed(rounds) if row.state != RoundState.OPEN.value]
    taken = [(float(row.number), *phases(row, visit)) for row in ended]
    totals = [collecting + (publishing or 0.0) for _, collecting, publishing in taken]
    summary = ""
    if totals:
        fastest, slowest = formatting.duration(min(totals)), formatting.duration(max(totals))
        summary = f"The latest {len(totals)} rounds took from {fastest} to {slowest} each."
    return line_chart(
        "phases",
        "Time of each phase, by round, logarithmic",
        [
            Series("Collecting updates", "collecting", [(x, max(0.0, y)) for x, y, _ in taken]),
            Series(
                "Aggregating and publishing",
                "publishing",
                [(x, max(0.0, y)) for x, _, y in taken if y is not None],
            ),
        ],
        x_label="Round",
        y_label="",
        written=formatting.duration,
        is_time=True,
        summary=summary,
    )


def turnout_chart(rounds: Sequence[Round]) -> Chart | None:
    """Return how many devices took part in the latest rounds, oldest first."""
    bars = [(row.number, _turnout(row)) for row in reversed(rounds)]
    if not any(part.value for _, parts in bars for part in parts):
        return None
    kept = {part.name for _, parts in bars for part in parts if part.value}
    used_counts = [parts[0].value for _, parts in bars]
    fewest, most = min(used_counts), max(used_counts)
    return bar_chart(
        "turnout",
        "Devices, by round",
        f"From {fewest:,.0f} to {most:,.0f} devices took part in each of the latest {len(bars)} rounds.",
        [(number, [part for part in parts if part.name in kept]) for number, parts in bars],
        x_label="Round",
        y_label="Devices (count)",
        written=lambda value: f"{value:,.0f}",
    )


def _turnout(row: Round) -> list[Part]:
    wanted = row.selected_count if row.selected_count > 0 else row.target
    counts = {
        "Took part": row.accepted_count - row.rejected_count,
        "Rejected": row.rejected_count,
        "Late": row.late_count,
        "No update": max(0, wanted - row.accepted_count - row.late_count),
    }
    return [Part(name, name.lower().replace(" ", "-"), float(n)) for name, n in counts.items()]
