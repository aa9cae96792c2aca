"""Comparison of training sessions: curves over each other, results and differing settings beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from qflare_server.serving.dashboard import formatting
from qflare_server.serving.dashboard.charts import Chart, Series, line_chart
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages.curves import MOST_CHOSEN, Choice, names, preferred
from qflare_server.serving.dashboard.pages.settings import differences, settings
from qflare_server.serving.dashboard.pages.training import session_row
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository.views import VersionMetrics
from qflare_server.training.reported_metrics import TRAINING

COLORS: Final = ("measured", "second", "third", "fourth")
MOST: Final = len(COLORS)
VERSIONS: Final = 300


@dataclass(frozen=True)
class Compared:
    """A training session with the metrics of its versions."""

    row: TrainingSession
    metrics: Sequence[VersionMetrics]
    css: str


def build(visit: PageContext) -> Mapping[str, Any]:
    """Build the comparison of up to four training sessions that the query names."""
    use_cases = visit.use_cases
    found = [
        Compared(
            use_cases.training.get(name), use_cases.promotion.recent_metrics(name, VERSIONS), css
        )
        for name, css in zip(visit.texts("session", MOST), COLORS, strict=False)
    ]
    known = {name for item in found for part in names(item.metrics) for name in part}
    usual = {name for item in found for name in preferred(item.row)}
    chosen = [name for name in visit.texts("metric", MOST_CHOSEN) if name in known] or sorted(
        usual & known
    )
    charts = [_chart(place, name, found) for place, name in enumerate(chosen)]
    return {
        "rows": [session_row(item.row, visit) for item in found],
        "colors": [item.css for item in found],
        "choices": [_choice(name, chosen, found) for name in sorted(known)],
        "charts": [chart for chart in charts if chart is not None],
        "settings": differences([settings(item.row.config) for item in found]),
    }


def _chart(place: int, name: str, found: Sequence[Compared]) -> Chart | None:
    return line_chart(
        f"compared-{place}",
        f"{name.capitalize() if name.isalpha() else name} by version",
        [_series(item, name) for item in found],
        x_label="Version",
        y_label="",
        written=lambda value: formatting.metric(value, name),
    )


def _series(item: Compared, name: str) -> Series:
    """Return the held-out values of a metric; those of training, and said so, where there are no others."""
    is_held_out = any(name in row.metrics for row in item.metrics)
    key = name if is_held_out else TRAINING + name
    points = [
        (float(row.version), float(row.metrics[key])) for row in item.metrics if key in row.metrics
    ]
    label = item.row.name if is_held_out else f"{item.row.name} (training data only)"
    return Series(label, item.css, points)


def _choice(name: str, chosen: Sequence[str], found: Sequence[Compared]) -> Choice:
    is_chosen = name in chosen
    others = [item for item in chosen if item != name]
    query = [("session", item.row.id) for item in found]
    query += [("metric", item) for item in (others if is_chosen else [*others, name])]
    return Choice(name, is_chosen, f"/compare?{urlencode(query)}")
