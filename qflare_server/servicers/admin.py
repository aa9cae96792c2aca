"""AdminService."""

from collections.abc import Iterator
from typing import Any

from grpc import ServicerContext

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2, training_pb2
from qflare_server.calls import current_call
from qflare_server.servicers import encoding
from qflare_server.servicers.admin_insight import AdminInsightServicer
from qflare_server.servicers.streams import chunks_of, split_header
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.audit.evidence import audit_evidence


def _page(request: Any) -> PageRequest:
    return PageRequest(request.page_size, request.page_token)


class AdminServicer(AdminInsightServicer):
    """Decodes, calls one use case, encodes.

    Args:
        use_cases: What does the work.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._do = use_cases

    def CreateTrainingSession(
        self, request: pb.CreateTrainingSessionRequest, context: ServicerContext
    ) -> pb.CreateTrainingSessionResponse:
        """Create a training session."""
        created = self._do.training.create(
            current_call().caller,
            name=request.name,
            model_type=request.model_type,
            architecture=dict(request.architecture),
            config=request.config,
            request_id=request.request_id,
        )
        return pb.CreateTrainingSessionResponse(training_session=encoding.training_session(created))

    def UploadInitialModel(
        self,
        request_iterator: Iterator[pb.UploadInitialModelRequest],
        context: ServicerContext,
    ) -> pb.UploadInitialModelResponse:
        """Upload the initial model."""
        header, first = split_header(request_iterator)
        model = self._do.initial_models.upload(
            current_call().caller, header, chunks_of(first, request_iterator)
        )
        return pb.UploadInitialModelResponse(
            global_model=encoding.global_model(model, with_manifest=True)
        )

    def StartTrainingSession(
        self, request: pb.StartTrainingSessionRequest, context: ServicerContext
    ) -> pb.StartTrainingSessionResponse:
        """Start the first round."""
        row = self._do.training.start(current_call().caller, request.training_session_id)
        return pb.StartTrainingSessionResponse(training_session=encoding.training_session(row))

    def PauseTrainingSession(
        self, request: pb.PauseTrainingSessionRequest, context: ServicerContext
    ) -> pb.PauseTrainingSessionResponse:
        """Take no updates until it is resumed."""
        row = self._do.training.pause(current_call().caller, request.training_session_id)
        return pb.PauseTrainingSessionResponse(training_session=encoding.training_session(row))

    def ResumeTrainingSession(
        self, request: pb.ResumeTrainingSessionRequest, context: ServicerContext
    ) -> pb.ResumeTrainingSessionResponse:
        """Go on after a pause."""
        row = self._do.training.resume(current_call().caller, request.training_session_id)
        return pb.ResumeTrainingSessionResponse(training_session=encoding.training_session(row))

    def CancelTrainingSession(
        self, request: pb.CancelTrainingSessionRequest, context: ServicerContext
    ) -> pb.CancelTrainingSessionResponse:
        """End it."""
        row = self._do.training.cancel(
            current_call().caller, request.training_session_id, request.reason
        )
        return pb.CancelTrainingSessionResponse(training_session=encoding.training_session(row))

    def GetTrainingSession(
        self, request: pb.GetTrainingSessionRequest, context: ServicerContext
    ) -> pb.GetTrainingSessionResponse:
        """Get a training session with its current round."""
        progress = self._do.training.progress(request.training_session_id)
        return pb.GetTrainingSessionResponse(
            training_session=encoding.training_session(progress.session),
            round=encoding.training_round(progress.round),
        )

    def ListTrainingSessions(
        self, request: pb.ListTrainingSessionsRequest, context: ServicerContext
    ) -> pb.ListTrainingSessionsResponse:
        """List training sessions."""
        state = encoding.state_name(
            "TRAINING_SESSION_STATE_", request.state, training_pb2.TrainingSessionState
        )
        page = self._do.training.list(_page(request), state)
        return pb.ListTrainingSessionsResponse(
            training_sessions=[encoding.training_session(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def ListRounds(
        self, request: pb.ListRoundsRequest, context: ServicerContext
    ) -> pb.ListRoundsResponse:
        """List the rounds of a training session."""
        page = self._do.training.list_rounds(request.training_session_id, _page(request))
        return pb.ListRoundsResponse(
            rounds=filter(None, map(encoding.training_round, page.rows)),
            next_page_token=page.next_token,
        )

    def ListGlobalModels(
        self, request: pb.ListGlobalModelsRequest, context: ServicerContext
    ) -> pb.ListGlobalModelsResponse:
        """List the versions of a training session."""
        page = self._do.training.list_models(request.training_session_id, _page(request))
        return pb.ListGlobalModelsResponse(
            global_models=[encoding.global_model(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def DownloadGlobalModel(
        self, request: pb.DownloadGlobalModelRequest, context: ServicerContext
    ) -> Iterator[pb.DownloadGlobalModelResponse]:
        """Download a version."""
        version = request.version if request.HasField("version") else None
        delivery = self._do.deliveries.find(request.training_session_id, version)
        chunks = self._do.deliveries.opened(current_call().caller, delivery, request.first_chunk)
        first = pb.DownloadGlobalModelResponse(header=encoding.opened_model_header(delivery))
        yield from encoding.in_messages(pb.DownloadGlobalModelResponse, first, chunks)

    def ListUpdates(
        self, request: pb.ListUpdatesRequest, context: ServicerContext
    ) -> pb.ListUpdatesResponse:
        """List the updates of a round."""
        page = self._do.training.list_updates(
            request.training_session_id, request.round_number, _page(request)
        )
        return pb.ListUpdatesResponse(
            updates=[encoding.model_update(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def GetAggregationStatus(
        self, request: pb.GetAggregationStatusRequest, context: ServicerContext
    ) -> pb.GetAggregationStatusResponse:
        """Get how far the aggregation is."""
        progress = self._do.training.progress(request.training_session_id)
        return pb.GetAggregationStatusResponse(
            round=encoding.training_round(progress.round),
            pending_update_count=progress.pending_count,
            missing_update_count=progress.missing_count,
            current_version=progress.session.current_version,
            last_publish_time=encoding.timestamp(
                None if progress.latest is None else progress.latest.created_at
            ),
            remaining_duration=encoding.duration(progress.remaining_s),
        )

    def GetDevice(
        self, request: pb.GetDeviceRequest, context: ServicerContext
    ) -> pb.GetDeviceResponse:
        """Get a device."""
        return pb.GetDeviceResponse(device=encoding.device(self._do.devices.get(request.device_id)))

    def ListDevices(
        self, request: pb.ListDevicesRequest, context: ServicerContext
    ) -> pb.ListDevicesResponse:
        """List devices."""
        wanted = DeviceFilter(
            state=encoding.state_name("DEVICE_STATE_", request.state, device_pb2.DeviceState),
            device_type=request.device_type,
            seen_after=encoding.moment(request, "seen_after_time"),
            capabilities=encoding.conditions(request.capabilities),
        )
        page = self._do.devices.list(_page(request), wanted)
        return pb.ListDevicesResponse(
            devices=[encoding.device(row) for row in page.rows], next_page_token=page.next_token
        )

    def SuspendDevice(
        self, request: pb.SuspendDeviceRequest, context: ServicerContext
    ) -> pb.SuspendDeviceResponse:
        """Forbid a device to call until it is reinstated."""
        row = self._do.devices.suspend(current_call().caller, request.device_id, request.reason)
        return pb.SuspendDeviceResponse(device=encoding.device(row))

    def ReinstateDevice(
        self, request: pb.ReinstateDeviceRequest, context: ServicerContext
    ) -> pb.ReinstateDeviceResponse:
        """Lift a suspension or a quarantine."""
        row = self._do.devices.reinstate(current_call().caller, request.device_id, request.reason)
        return pb.ReinstateDeviceResponse(device=encoding.device(row))

    def RevokeDevice(
        self, request: pb.RevokeDeviceRequest, context: ServicerContext
    ) -> pb.RevokeDeviceResponse:
        """Forbid a device to call for ever."""
        row = self._do.devices.revoke(current_call().caller, request.device_id, request.reason)
        return pb.RevokeDeviceResponse(device=encoding.device(row))

    def IssueEnrollmentTokens(
        self, request: pb.IssueEnrollmentTokensRequest, context: ServicerContext
    ) -> pb.IssueEnrollmentTokensResponse:
        """Issue enrollment tokens."""
        issued = self._do.tokens.issue_enrollment(
            current_call().caller,
            count=request.token_count or 1,
            label=request.label,
            lifetime_s=encoding.seconds(request, "lifetime"),
            device_id=request.device_id,
            request_id=request.request_id,
        )
        return pb.IssueEnrollmentTokensResponse(
            tokens=[encoding.issued_token(item) for item in issued]
        )

    def ListTokens(
        self, request: pb.ListTokensRequest, context: ServicerContext
    ) -> pb.ListTokensResponse:
        """List tokens."""
        kind = encoding.state_name("TOKEN_KIND_", request.kind, pb.TokenKind)
        page = self._do.tokens.list(_page(request), kind)
        return pb.ListTokensResponse(
            tokens=[encoding.token(row) for row in page.rows], next_page_token=page.next_token
        )

    def RevokeToken(
        self, request: pb.RevokeTokenRequest, context: ServicerContext
    ) -> pb.RevokeTokenResponse:
        """Revoke a token."""
        row = self._do.tokens.revoke(current_call().caller, request.token_id, request.reason)
        return pb.RevokeTokenResponse(token=encoding.token(row))

    def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: ServicerContext
    ) -> pb.ListAuditEntriesResponse:
        """List audit entries."""
        wanted = AuditFilter(
            start=encoding.moment(request, "start_time"),
            end=encoding.moment(request, "end_time"),
            actor=request.actor,
            subject=request.subject,
            event_type=request.event_type,
            risk_level=encoding.state_name("RISK_LEVEL_", request.risk_level, pb.RiskLevel),
        )
        page = self._do.audit.list(_page(request), wanted)
        return pb.ListAuditEntriesResponse(
            entries=[encoding.audit_entry(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def GetAuditProof(
        self, request: pb.GetAuditProofRequest, context: ServicerContext
    ) -> pb.GetAuditProofResponse:
        """Prove that an audit entry is in the log."""
        proof = self._do.audit.proof(
            audit_id=None if request.HasField("leaf_index") else request.audit_id,
            leaf_index=request.leaf_index if request.HasField("leaf_index") else None,
            tree_size=request.tree_size if request.HasField("tree_size") else None,
        )
        return pb.GetAuditProofResponse(
            entry=audit_evidence(proof), head=None if proof.head is None else proof.head.envelope
        )

    def ExportVerificationBundle(
        self, request: pb.ExportVerificationBundleRequest, context: ServicerContext
    ) -> Iterator[pb.ExportVerificationBundleResponse]:
        """Export what an offline verifier needs for a version."""
        version = request.version if request.HasField("version") else None
        for part in self._do.evidence.bundle(request.training_session_id, version):
            yield pb.ExportVerificationBundleResponse(bundle=part)
