"""Operations that devices, administrators and auditors can call; they open the transactions."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qflare_server.context import Context
from qflare_server.keys.server_keys import ServerKeys
from qflare_server.use_cases.access.authentication import Authentication
from qflare_server.use_cases.access.dashboard_login import DashboardLogin
from qflare_server.use_cases.access.login import Login
from qflare_server.use_cases.access.objects import ObjectAccess
from qflare_server.use_cases.access.oidc import Oidc, open_oidc
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.access.repeated_calls import RepeatedCalls
from qflare_server.use_cases.access.tokens import Tokens
from qflare_server.use_cases.audit.evidence import Evidence
from qflare_server.use_cases.audit.log import Audit, AuditExport
from qflare_server.use_cases.devices.administration import Devices
from qflare_server.use_cases.devices.enrollment import Enrollment
from qflare_server.use_cases.devices.key_rotation import KeyRotations
from qflare_server.use_cases.status import Overview
from qflare_server.use_cases.training_sessions.administration import Training
from qflare_server.use_cases.training_sessions.explanation import Explanations
from qflare_server.use_cases.training_sessions.round_changes import RoundChanges
from qflare_server.use_cases.training_sessions.tasks import Tasks
from qflare_server.use_cases.training_sessions.watching import Watching
from qflare_server.use_cases.updates.evaluations import Evaluations
from qflare_server.use_cases.updates.failures import Failures
from qflare_server.use_cases.updates.neighbor_steps import NeighborSteps
from qflare_server.use_cases.updates.relayed import RelayedUpdates
from qflare_server.use_cases.updates.upload import Uploads
from qflare_server.use_cases.versions.download import Deliveries
from qflare_server.use_cases.versions.initial_model import InitialModels
from qflare_server.use_cases.versions.lineage import Lineage
from qflare_server.use_cases.versions.promotion import Promotion
from qflare_server.use_cases.versions.query_results import QueryResults


@dataclass(frozen=True)
class UseCases:
    """The coordinator's use cases."""

    authentication: Authentication
    objects: ObjectAccess
    enrollment: Enrollment
    key_rotations: KeyRotations
    login: Login
    tasks: Tasks
    uploads: Uploads
    relayed: RelayedUpdates
    evaluations: Evaluations
    failures: Failures
    neighbor_steps: NeighborSteps
    explanations: Explanations
    deliveries: Deliveries
    devices: Devices
    tokens: Tokens
    repeated_calls: RepeatedCalls
    training: Training
    round_changes: RoundChanges
    initial_models: InitialModels
    audit: Audit
    audit_export: AuditExport
    evidence: Evidence
    promotion: Promotion
    lineage: Lineage
    query_results: QueryResults
    watching: Watching
    overview: Overview
    presence: Presence
    dashboard_login: DashboardLogin
    oidc: Oidc | None


def build_use_cases(context: Context, keys: ServerKeys, executor: ThreadPoolExecutor) -> UseCases:
    """Build every use case on the same components.

    Args:
        context: The coordinator's components.
        keys: The server keys.
        executor: Runs the writes of large payloads.
    """
    presence = Presence(context.config, context.database)
    training = Training(context)
    oidc = open_oidc(context)
    access, uploads = ObjectAccess(context), Uploads(context, executor)
    authentication = Authentication(context, presence, oidc.tokens if oidc else None)
    return UseCases(
        authentication=authentication,
        objects=access,
        enrollment=Enrollment(context, keys),
        key_rotations=KeyRotations(context, keys),
        login=Login(context, keys),
        tasks=Tasks(context, presence),
        uploads=uploads,
        relayed=RelayedUpdates(context, uploads, access, presence),
        evaluations=Evaluations(context),
        failures=Failures(context),
        neighbor_steps=NeighborSteps(context),
        explanations=Explanations(context),
        deliveries=Deliveries(context, executor),
        devices=Devices(context),
        tokens=Tokens(context),
        repeated_calls=RepeatedCalls(context),
        training=training,
        round_changes=RoundChanges(context),
        initial_models=InitialModels(context, executor, training),
        audit=Audit(context),
        audit_export=AuditExport(context),
        evidence=Evidence(context),
        promotion=Promotion(context),
        lineage=Lineage(context, keys),
        query_results=QueryResults(context),
        watching=Watching(context),
        overview=Overview(context),
        presence=presence,
        dashboard_login=DashboardLogin(context, authentication),
        oidc=oidc,
    )
