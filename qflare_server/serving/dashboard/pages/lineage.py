"""Lineage pages: the versions of a training session, and statement and proof of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qflare.v1 import training_pb2
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext, whole
from qflare_server.serving.dashboard.pages.training import session_row
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import TrainingSession
from qflare_server.training.objective import objective_of
from qflare_server.use_cases.versions.lineage import Link

SHOWN: Final = 8
ROWS: Final = 25
SHORT_DIGEST: Final = 12


@dataclass(frozen=True)
class VersionRow:
    """A version in the line of lineage."""

    version: int
    digest: str
    parent: str
    contributor_count: int
    example_count: int
    method: str
    metric: str
    value: float | None
    epsilon: float | None
    noise_source: str
    is_released: bool
    is_best: bool
    is_current: bool
    rollback_version: int | None
    problem: str
    created: Moment | None


def version_row(link: Link, owner: TrainingSession, visit: PageContext) -> VersionRow:
    """Return a version as it is shown."""
    model, objective = link.model, objective_of(owner.config)
    return VersionRow(
        version=model.version,
        digest=model.digest,
        parent=model.parent_digest,
        contributor_count=model.participant_count,
        example_count=model.example_count,
        method=model.aggregation_method,
        metric=objective.metric,
        value=model.metrics.get(objective.key),
        epsilon=model.epsilon,
        noise_source=_noise_source(owner.config),
        is_released=model.released,
        is_best=model.version == owner.best_version,
        is_current=model.version == owner.current_version,
        rollback_version=model.rollback_version,
        problem=link.problem,
        created=moment(model.created_at, visit.at),
    )


def _noise_source(config: training_pb2.TrainingConfig) -> str:
    """Return who adds the noise of differential privacy."""
    names = {
        training_pb2.NOISE_SOURCE_DEVICES: "the devices",
        training_pb2.NOISE_SOURCE_HELPER: "the helpers",
    }
    return names.get(config.secure_aggregation.noise, "the coordinator")


def newest(owner: TrainingSession, visit: PageContext) -> list[VersionRow]:
    """Return the newest versions of a training session."""
    links = visit.use_cases.lineage.links(owner.id, PageRequest(SHOWN)).rows
    return [version_row(link, owner, visit) for link in links]


def build_list(visit: PageContext) -> Mapping[str, Any]:
    """Build the list of all versions of a training session."""
    owner = visit.use_cases.training.get(visit.part("session_id"))
    page = visit.use_cases.lineage.links(owner.id, visit.rows(ROWS))
    return {
        "session": session_row(owner, visit),
        "rows": [version_row(link, owner, visit) for link in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
    }


def build_version(visit: PageContext) -> Mapping[str, Any]:
    """Build the page of one version: statement and proof."""
    number = whole(visit.part("number"), "version")
    owner = visit.use_cases.training.get(visit.part("session_id"))
    proof = visit.use_cases.lineage.prove(owner.id, number, with_log=visit.may("ListAuditEntries"))
    problem = next((check.detail for check in proof.checks if check.passed is False), "")
    return {
        "session": session_row(owner, visit),
        "row": version_row(Link(proof.model, problem), owner, visit),
        "proof": proof,
        "statement": proof.statement,
        "published": moment(proof.model.created_at, visit.at),
        "has_next": number < owner.current_version,
        "names": visit.use_cases.devices.names_of(item.device_id for item in proof.updates),
    }
