"""AdminService."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from grpc import ServicerContext

import qflare
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import admin_service_pb2_grpc, device_pb2, training_pb2
from qflare_server.serving.rpc.call import current_call
from qflare_server.serving.rpc.encoding import audit, devices, status, training, values, versions
from qflare_server.serving.rpc.repeatable import RepeatableCalls
from qflare_server.serving.rpc.streams import chunks_of, split_header
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import AuditLog, Device
from qflare_server.storage.repository.audit import AuditFilter, device_of
from qflare_server.storage.repository.devices import DeviceFilter
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.audit.evidence import audit_evidence
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.training_sessions.round_changes import RoundChange


def _page(request: Any) -> PageRequest:
    return PageRequest(request.page_size, request.page_token)


class AdminServicer(admin_service_pb2_grpc.AdminServiceServicer):
    """The AdminService servicer: decodes, calls one use case, encodes.

    Args:
        use_cases: The use cases.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._use_cases = use_cases
        self._repeatable = RepeatableCalls(use_cases.repeated_calls)

    def CreateTrainingSession(
        self, request: pb.CreateTrainingSessionRequest, context: ServicerContext
    ) -> pb.CreateTrainingSessionResponse:
        """Create a training session, or only check the request."""
        if request.validate_only:
            return self._validate(request)
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.training.create(
                caller,
                name=request.name,
                model_type=request.model_type,
                architecture=dict(request.architecture),
                config=request.config,
            ),
            lambda row: pb.CreateTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def _validate(
        self, request: pb.CreateTrainingSessionRequest
    ) -> pb.CreateTrainingSessionResponse:
        layout = request.manifest if request.HasField("manifest") else None
        config = self._use_cases.initial_models.validate(
            request.name, request.model_type, request.config, layout, dict(request.architecture)
        )
        return pb.CreateTrainingSessionResponse(
            training_session=training.validated(request, config)
        )

    def UploadInitialModel(
        self,
        request_iterator: Iterator[pb.UploadInitialModelRequest],
        context: ServicerContext,
    ) -> pb.UploadInitialModelResponse:
        """Upload the initial model."""
        header, first = split_header(request_iterator)
        model = self._use_cases.initial_models.upload(
            current_call().caller, header, chunks_of(first, request_iterator)
        )
        return pb.UploadInitialModelResponse(
            global_model=versions.global_model(model, with_manifest=True)
        )

    def StartTrainingSession(
        self, request: pb.StartTrainingSessionRequest, context: ServicerContext
    ) -> pb.StartTrainingSessionResponse:
        """Start the first round."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.training.start(caller, request.training_session_id),
            lambda row: pb.StartTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def PauseTrainingSession(
        self, request: pb.PauseTrainingSessionRequest, context: ServicerContext
    ) -> pb.PauseTrainingSessionResponse:
        """Accept no updates until the session is resumed."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.training.pause(caller, request.training_session_id),
            lambda row: pb.PauseTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def ResumeTrainingSession(
        self, request: pb.ResumeTrainingSessionRequest, context: ServicerContext
    ) -> pb.ResumeTrainingSessionResponse:
        """Resume after a pause."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.training.resume(caller, request.training_session_id),
            lambda row: pb.ResumeTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def UpdateTrainingSession(
        self, request: pb.UpdateTrainingSessionRequest, context: ServicerContext
    ) -> pb.UpdateTrainingSessionResponse:
        """Change quorum, target and deadline of the rounds."""
        change = RoundChange(
            request.quorum if request.HasField("quorum") else None,
            request.target if request.HasField("target") else None,
            request.deadline if request.HasField("deadline") else None,
        )
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.round_changes.run(
                caller, request.training_session_id, change
            ),
            lambda row: pb.UpdateTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def CancelTrainingSession(
        self, request: pb.CancelTrainingSessionRequest, context: ServicerContext
    ) -> pb.CancelTrainingSessionResponse:
        """Cancel a training session."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.training.cancel(
                caller, request.training_session_id, request.reason
            ),
            lambda row: pb.CancelTrainingSessionResponse(
                training_session=training.training_session(row)
            ),
        )

    def GetTrainingSession(
        self, request: pb.GetTrainingSessionRequest, context: ServicerContext
    ) -> pb.GetTrainingSessionResponse:
        """Get a training session with its current round."""
        progress = self._use_cases.training.progress(request.training_session_id)
        return pb.GetTrainingSessionResponse(
            training_session=training.training_session(progress.session),
            round=training.training_round(progress.round, progress.groups),
            notices=self._notices(request.training_session_id),
        )

    def _notices(self, training_session_id: str) -> list[training_pb2.Notice]:
        return training.notices(self._use_cases.explanations.find(training_session_id))

    def ListTrainingSessions(
        self, request: pb.ListTrainingSessionsRequest, context: ServicerContext
    ) -> pb.ListTrainingSessionsResponse:
        """List training sessions."""
        state = values.state_name(
            "TRAINING_SESSION_STATE_", request.state, training_pb2.TrainingSessionState
        )
        page = self._use_cases.training.list(_page(request), state, request.reference)
        return pb.ListTrainingSessionsResponse(
            training_sessions=[training.training_session(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def ListRounds(
        self, request: pb.ListRoundsRequest, context: ServicerContext
    ) -> pb.ListRoundsResponse:
        """List the rounds of a training session."""
        page = self._use_cases.training.list_rounds(request.training_session_id, _page(request))
        groups = self._use_cases.training.group_progress(
            request.training_session_id, [row.number for row in page.rows]
        )
        rounds = [training.training_round(row, groups.get(row.number)) for row in page.rows]
        return pb.ListRoundsResponse(
            rounds=filter(None, rounds),
            next_page_token=page.next_token,
        )

    def ListGlobalModels(
        self, request: pb.ListGlobalModelsRequest, context: ServicerContext
    ) -> pb.ListGlobalModelsResponse:
        """List the versions of a training session."""
        page = self._use_cases.training.list_models(request.training_session_id, _page(request))
        return pb.ListGlobalModelsResponse(
            global_models=[versions.global_model(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def DownloadGlobalModel(
        self, request: pb.DownloadGlobalModelRequest, context: ServicerContext
    ) -> Iterator[pb.DownloadGlobalModelResponse]:
        """Download a version."""
        version = request.version if request.HasField("version") else None
        delivery = self._use_cases.deliveries.find(request.training_session_id, version)
        chunks = self._use_cases.deliveries.opened(
            current_call().caller, delivery, request.first_chunk
        )
        first = pb.DownloadGlobalModelResponse(header=versions.opened_model_header(delivery))
        yield from values.in_messages(pb.DownloadGlobalModelResponse, first, chunks)

    def ListUpdates(
        self, request: pb.ListUpdatesRequest, context: ServicerContext
    ) -> pb.ListUpdatesResponse:
        """List the updates of a round."""
        page = self._use_cases.training.list_updates(
            request.training_session_id, request.round_number, _page(request)
        )
        names = self._use_cases.devices.names_of(row.device_id for row in page.rows)
        return pb.ListUpdatesResponse(
            updates=[versions.model_update(row, names) for row in page.rows],
            next_page_token=page.next_token,
        )

    def GetAggregationStatus(
        self, request: pb.GetAggregationStatusRequest, context: ServicerContext
    ) -> pb.GetAggregationStatusResponse:
        """Get the progress of the aggregation."""
        progress = self._use_cases.training.progress(request.training_session_id)
        return pb.GetAggregationStatusResponse(
            round=training.training_round(progress.round, progress.groups),
            pending_update_count=progress.pending_count,
            missing_update_count=progress.missing_count,
            current_version=progress.session.current_version,
            last_publish_time=values.timestamp(
                None if progress.latest is None else progress.latest.created_at
            ),
            remaining_duration=values.duration(progress.remaining_s),
            notices=self._notices(request.training_session_id),
        )

    def GetDevice(
        self, request: pb.GetDeviceRequest, context: ServicerContext
    ) -> pb.GetDeviceResponse:
        """Get a device."""
        return pb.GetDeviceResponse(
            device=self._device(self._use_cases.devices.get(request.device_id))
        )

    def ListDevices(
        self, request: pb.ListDevicesRequest, context: ServicerContext
    ) -> pb.ListDevicesResponse:
        """List devices."""
        wanted = DeviceFilter(
            state=values.state_name("DEVICE_STATE_", request.state, device_pb2.DeviceState),
            device_type=request.device_type,
            seen_after=values.moment(request, "seen_after_time"),
            capabilities=devices.conditions(request.capabilities),
            group=request.group,
            reference=request.reference,
        )
        page = self._use_cases.devices.list(_page(request), wanted)
        groups = self._use_cases.devices.groups_of([row.id for row in page.rows])
        return pb.ListDevicesResponse(
            devices=[devices.device(row, groups.get(row.id, ())) for row in page.rows],
            next_page_token=page.next_token,
        )

    def RenameDevice(
        self, request: pb.RenameDeviceRequest, context: ServicerContext
    ) -> pb.RenameDeviceResponse:
        """Change the name of a device."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.rename(
                caller, request.device_id, request.name, request.reason
            ),
            lambda found: pb.RenameDeviceResponse(device=devices.device(*found)),
        )

    def SuspendDevice(
        self, request: pb.SuspendDeviceRequest, context: ServicerContext
    ) -> pb.SuspendDeviceResponse:
        """Suspend a device until it is reinstated."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.suspend(
                caller, request.device_id, request.reason
            ),
            lambda found: pb.SuspendDeviceResponse(device=devices.device(*found)),
        )

    def ReinstateDevice(
        self, request: pb.ReinstateDeviceRequest, context: ServicerContext
    ) -> pb.ReinstateDeviceResponse:
        """Lift a suspension or a quarantine."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.reinstate(
                caller, request.device_id, request.reason
            ),
            lambda found: pb.ReinstateDeviceResponse(device=devices.device(*found)),
        )

    def RevokeDevice(
        self, request: pb.RevokeDeviceRequest, context: ServicerContext
    ) -> pb.RevokeDeviceResponse:
        """Revoke a device permanently, effective on its next call."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.revoke(
                caller, request.device_id, request.reason
            ),
            lambda found: pb.RevokeDeviceResponse(device=devices.device(*found)),
        )

    def SetDeviceGroups(
        self, request: pb.SetDeviceGroupsRequest, context: ServicerContext
    ) -> pb.SetDeviceGroupsResponse:
        """Set the groups of a device."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.set_groups(
                caller, request.device_id, list(request.groups), request.reason
            ),
            lambda found: pb.SetDeviceGroupsResponse(device=devices.device(*found)),
        )

    def ConfirmDeviceProfile(
        self, request: pb.ConfirmDeviceProfileRequest, context: ServicerContext
    ) -> pb.ConfirmDeviceProfileResponse:
        """Confirm the device type and the capabilities of a device."""
        profile = Profile(request.device_type, capabilities=dict(request.capabilities))
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.devices.confirm_profile(
                caller, request.device_id, profile, request.reason
            ),
            lambda found: pb.ConfirmDeviceProfileResponse(device=devices.device(*found)),
        )

    def _device(self, row: Device) -> device_pb2.Device:
        groups = self._use_cases.devices.groups_of([row.id])
        return devices.device(row, groups.get(row.id, ()))

    def IssueEnrollmentTokens(
        self, request: pb.IssueEnrollmentTokensRequest, context: ServicerContext
    ) -> pb.IssueEnrollmentTokensResponse:
        """Issue enrollment tokens."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.tokens.issue_enrollment(
                caller,
                count=request.token_count or 1,
                label=request.label,
                lifetime_s=values.seconds(request, "lifetime"),
                device_id=request.device_id,
                groups=list(request.groups),
            ),
            lambda issued: pb.IssueEnrollmentTokensResponse(
                tokens=[devices.issued_token(item) for item in issued]
            ),
            holds_secrets=True,
        )

    def ListTokens(
        self, request: pb.ListTokensRequest, context: ServicerContext
    ) -> pb.ListTokensResponse:
        """List tokens."""
        kind = values.state_name("TOKEN_KIND_", request.kind, pb.TokenKind)
        page = self._use_cases.tokens.list(_page(request), kind)
        names = self._use_cases.devices.names_of(
            row.device_id for row in page.rows if row.device_id
        )
        return pb.ListTokensResponse(
            tokens=[devices.token(row, names) for row in page.rows],
            next_page_token=page.next_token,
        )

    def RevokeToken(
        self, request: pb.RevokeTokenRequest, context: ServicerContext
    ) -> pb.RevokeTokenResponse:
        """Revoke a token."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.tokens.revoke(caller, request.token_id, request.reason),
            lambda row: pb.RevokeTokenResponse(token=devices.token(row)),
        )

    def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: ServicerContext
    ) -> pb.ListAuditEntriesResponse:
        """List audit entries."""
        wanted = AuditFilter(
            start=values.moment(request, "start_time"),
            end=values.moment(request, "end_time"),
            actor=request.actor,
            subject=request.subject,
            event_type=request.event_type,
            risk_level=values.state_name("RISK_LEVEL_", request.risk_level, pb.RiskLevel),
        )
        page = self._use_cases.audit.list(_page(request), wanted)
        return pb.ListAuditEntriesResponse(
            entries=self._audit_entries(page.rows),
            next_page_token=page.next_token,
        )

    def GetAuditProof(
        self, request: pb.GetAuditProofRequest, context: ServicerContext
    ) -> pb.GetAuditProofResponse:
        """Return the inclusion proof of an audit entry."""
        proof = self._use_cases.audit.proof(
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
        """Export a verification bundle of a version."""
        version = request.version if request.HasField("version") else None
        for part in self._use_cases.evidence.bundle(request.training_session_id, version):
            yield pb.ExportVerificationBundleResponse(bundle=part)

    def WatchTrainingSession(
        self, request: pb.WatchTrainingSessionRequest, context: ServicerContext
    ) -> Iterator[pb.WatchTrainingSessionResponse]:
        """Stream the events of a training session."""
        gone = threading.Event()
        context.add_callback(gone.set)
        known = request.known_round_number if request.HasField("known_round_number") else None
        happenings = self._use_cases.watching.watch(
            request.training_session_id,
            gone,
            known_round=known,
            duration_s=values.seconds(request, "duration"),
        )
        for happening in happenings:
            yield training.session_event(happening, self._use_cases.overview.now())

    def DescribeGlobalModel(
        self, request: pb.DescribeGlobalModelRequest, context: ServicerContext
    ) -> pb.DescribeGlobalModelResponse:
        """Describe a version."""
        version = request.version if request.HasField("version") else None
        model = self._use_cases.promotion.describe(request.training_session_id, version)
        return pb.DescribeGlobalModelResponse(
            global_model=versions.global_model(model, with_manifest=True),
            statement=values.envelope(model.statement, model.signature),
        )

    def ListMetrics(
        self, request: pb.ListMetricsRequest, context: ServicerContext
    ) -> pb.ListMetricsResponse:
        """List the metrics of versions."""
        page = self._use_cases.promotion.list_metrics(
            request.training_session_id, PageRequest(request.page_size, request.page_token)
        )
        return pb.ListMetricsResponse(
            metrics=[versions.version_metrics(row) for row in page.rows],
            next_page_token=page.next_token,
        )

    def RollbackGlobalModel(
        self, request: pb.RollbackGlobalModelRequest, context: ServicerContext
    ) -> pb.RollbackGlobalModelResponse:
        """Roll back to an older version, which becomes the base of the next round."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.promotion.roll_back(
                caller, request.training_session_id, request.version, request.reason
            ),
            lambda made: pb.RollbackGlobalModelResponse(
                global_model=versions.global_model(made.model),
                round=training.training_round(made.round),
            ),
        )

    def ReleaseGlobalModel(
        self, request: pb.ReleaseGlobalModelRequest, context: ServicerContext
    ) -> pb.ReleaseGlobalModelResponse:
        """Release a version."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.promotion.release(
                caller, request.training_session_id, request.version, request.reason
            ),
            lambda model: pb.ReleaseGlobalModelResponse(global_model=versions.global_model(model)),
        )

    def IssueAdminToken(
        self, request: pb.IssueAdminTokenRequest, context: ServicerContext
    ) -> pb.IssueAdminTokenResponse:
        """Issue an admin token."""
        return self._repeatable.answer(
            request,
            lambda caller: self._use_cases.tokens.issue_admin(
                caller, request.name, list(request.roles), values.seconds(request, "lifetime")
            ),
            lambda issued: pb.IssueAdminTokenResponse(token=devices.issued_token(issued)),
            holds_secrets=True,
        )

    def ExportAuditEntries(
        self, request: pb.ExportAuditEntriesRequest, context: ServicerContext
    ) -> Iterator[pb.ExportAuditEntriesResponse]:
        """Export audit entries."""
        wanted = AuditFilter(
            start=values.moment(request, "start_time"),
            end=values.moment(request, "end_time"),
            actor=request.actor,
            subject=request.subject,
            event_type=request.event_type,
            risk_level=values.state_name("RISK_LEVEL_", request.risk_level, pb.RiskLevel),
        )
        for batch in self._use_cases.audit_export.batches(wanted, request.after_audit_id):
            yield pb.ExportAuditEntriesResponse(entries=self._audit_entries(batch))

    def _audit_entries(self, rows: Sequence[AuditLog]) -> list[pb.AuditEntry]:
        devices_named = {device_of(party) for row in rows for party in (row.actor, row.subject)}
        names = self._use_cases.devices.names_of(devices_named - {""})
        return [audit.audit_entry(row, names) for row in rows]

    def GetCoordinatorStatus(
        self, request: pb.GetCoordinatorStatusRequest, context: ServicerContext
    ) -> pb.GetCoordinatorStatusResponse:
        """Get the coordinator's status."""
        report = self._use_cases.overview.report()
        response = status.coordinator_status(report)
        response.version = qflare.__version__
        response.watcher_count = self._use_cases.watching.watcher_count
        return response
