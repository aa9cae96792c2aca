"""Page of one training session."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from qflare_server.serving.dashboard.charts import Chart
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages import curves, lineage
from qflare_server.serving.dashboard.pages.queries import result_of
from qflare_server.serving.dashboard.pages.roll import roll
from qflare_server.serving.dashboard.pages.settings import differences, sections, settings
from qflare_server.serving.dashboard.pages.training import ROWS, current, round_row, session_row
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository.views import VersionMetrics

SHOWN_VERSIONS: Final = 300
SHOWN_BARS: Final = 30
SHOWN_CHANGES: Final = 20


class ChangeRow(NamedTuple):
    """A change of the configuration in the list; `round_number` is 0 before the first round."""

    at: Moment | None
    round_number: int
    settings: Sequence[tuple[str, Sequence[str]]]
    """Each setting that changed, with its values before and after."""


def build(visit: PageContext) -> Mapping[str, Any]:
    """Build the page of one training session."""
    training_session_id = visit.part("session_id")
    progress = visit.use_cases.training.progress(training_session_id)
    metrics = visit.use_cases.promotion.recent_metrics(training_session_id, SHOWN_VERSIONS)
    page = visit.use_cases.training.list_rounds(training_session_id, visit.rows(ROWS))
    newest = visit.use_cases.training.list_rounds(training_session_id, PageRequest(SHOWN_BARS)).rows
    return {
        "row": session_row(progress.session, visit),
        "notices": visit.use_cases.explanations.find(progress.session.id),
        "current": current(progress, visit),
        "result": result_of(progress.session, visit),
        "headline": curves.headline(progress.session, metrics),
        "curves": curves.build(progress.session, metrics, visit),
        "roll": roll(progress.session, progress.round, visit),
        "settings": sections(progress.session.config),
        "changes": _changes(progress.session, visit),
        "versions": lineage.newest(progress.session, visit),
        "charts": _charts(progress.session, metrics, newest, visit),
        "query": {"metric": chosen}
        if (chosen := visit.texts("metric", curves.MOST_CHOSEN))
        else {},
        "is_cut": bool(metrics) and metrics[0].version > 0,
        "shown_versions": SHOWN_VERSIONS,
        "rounds": [round_row(row, visit) for row in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
    }


def _changes(row: TrainingSession, visit: PageContext) -> list[ChangeRow]:
    """Return the newest changes of the configuration, newest first."""
    return [
        ChangeRow(
            moment(item.at, visit.at),
            item.round_number,
            differences([settings(item.before), settings(item.after)]),
        )
        for item in visit.use_cases.round_changes.list(row.id, SHOWN_CHANGES)
    ]


def _charts(
    row: TrainingSession,
    metrics: Sequence[VersionMetrics],
    rounds: Sequence[Round],
    visit: PageContext,
) -> list[Chart]:
    found = (
        curves.privacy_chart(row, metrics),
        curves.phase_chart(rounds, visit),
        curves.turnout_chart(rounds),
    )
    return [chart for chart in found if chart is not None]
