"""AdminService: what is watched, measured, released, exported, and how the coordinator is."""

import threading
from collections.abc import Iterator

from grpc import ServicerContext

import qflare
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import admin_service_pb2_grpc
from qflare_server.calls import current_call
from qflare_server.servicers import encoding, encoding_insight
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.use_cases import UseCases


class AdminInsightServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """Decodes, calls one use case, encodes.

    Args:
        use_cases: What does the work.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._do = use_cases

    def WatchTrainingSession(
        self, request: pb.WatchTrainingSessionRequest, context: ServicerContext
    ) -> Iterator[pb.WatchTrainingSessionResponse]:
        """Follow a training session."""
        gone = threading.Event()
        context.add_callback(gone.set)
        known = request.known_round_number if request.HasField("known_round_number") else None
        happenings = self._do.watching.watch(
            request.training_session_id,
            gone,
            known_round=known,
            duration_s=encoding.seconds(request, "duration"),
        )
        for happening in happenings:
            yield encoding_insight.session_event(happening, self._do.overview.now())

    def DescribeGlobalModel(
        self, request: pb.DescribeGlobalModelRequest, context: ServicerContext
    ) -> pb.DescribeGlobalModelResponse:
        """Describe a version."""
        version = request.version if request.HasField("version") else None
        model = self._do.promotion.describe(request.training_session_id, version)
        return pb.DescribeGlobalModelResponse(
            global_model=encoding.global_model(model, with_manifest=True),
            statement=encoding.envelope(model.statement, model.signature),
        )

    def ListMetrics(
        self, request: pb.ListMetricsRequest, context: ServicerContext
    ) -> pb.ListMetricsResponse:
        """List the metrics of versions."""
        page = self._do.promotion.list_metrics(
            request.training_session_id, PageRequest(request.page_size, request.page_token)
        )
        return pb.ListMetricsResponse(
            metrics=[encoding_insight.version_metrics(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def RollbackGlobalModel(
        self, request: pb.RollbackGlobalModelRequest, context: ServicerContext
    ) -> pb.RollbackGlobalModelResponse:
        """Make an older version the base of the next round."""
        made = self._do.promotion.roll_back(
            current_call().caller, request.training_session_id, request.version, request.reason
        )
        return pb.RollbackGlobalModelResponse(
            global_model=encoding.global_model(made.model),
            round=encoding.training_round(made.round),
        )

    def ReleaseGlobalModel(
        self, request: pb.ReleaseGlobalModelRequest, context: ServicerContext
    ) -> pb.ReleaseGlobalModelResponse:
        """Release a version."""
        model = self._do.promotion.release(
            current_call().caller, request.training_session_id, request.version, request.reason
        )
        return pb.ReleaseGlobalModelResponse(global_model=encoding.global_model(model))

    def IssueAdminToken(
        self, request: pb.IssueAdminTokenRequest, context: ServicerContext
    ) -> pb.IssueAdminTokenResponse:
        """Issue an admin token."""
        issued = self._do.tokens.issue_admin(
            current_call().caller,
            request.name,
            list(request.roles),
            encoding.seconds(request, "lifetime"),
            request.request_id,
        )
        return pb.IssueAdminTokenResponse(token=encoding.issued_token(issued))

    def ExportAuditEntries(
        self, request: pb.ExportAuditEntriesRequest, context: ServicerContext
    ) -> Iterator[pb.ExportAuditEntriesResponse]:
        """Export audit entries."""
        wanted = AuditFilter(
            start=encoding.moment(request, "start_time"),
            end=encoding.moment(request, "end_time"),
            actor=request.actor,
            subject=request.subject,
            event_type=request.event_type,
            risk_level=encoding.state_name("RISK_LEVEL_", request.risk_level, pb.RiskLevel),
        )
        for batch in self._do.audit_export.batches(wanted, request.after_audit_id):
            yield pb.ExportAuditEntriesResponse(
                entries=[encoding.audit_entry(row) for row in batch]
            )

    def GetCoordinatorStatus(
        self, request: pb.GetCoordinatorStatusRequest, context: ServicerContext
    ) -> pb.GetCoordinatorStatusResponse:
        """Get how the coordinator is."""
        report = self._do.overview.report()
        response = encoding_insight.coordinator_status(report)
        response.version = qflare.__version__
        response.watcher_count = self._do.watching.watcher_count
        return response
