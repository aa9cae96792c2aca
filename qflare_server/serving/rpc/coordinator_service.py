"""CoordinatorService: the methods that devices call."""

from collections.abc import Iterator
from typing import Final

from grpc import ServicerContext

from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import coordinator_service_pb2_grpc, security_pb2
from qflare_server.errors import QflareError
from qflare_server.serving.rpc.call import current_call
from qflare_server.serving.rpc.encoding import devices, values, versions
from qflare_server.serving.rpc.status import refusal_of
from qflare_server.serving.rpc.streams import chunks_of, rest_of, split_header
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import GroupStage
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.devices.enrollment import profile_of
from qflare_server.use_cases.training_sessions.tasks import ADVERTISE, NextTask
from qflare_server.use_cases.updates.submission import Contributor


def _contributor() -> Contributor:
    call = current_call()
    who = call.principal
    return Contributor(call.device_id, who.key_id, who.key_algorithm, who.public_key)


_STEPS: Final = {
    ADVERTISE: pb.TASK_KIND_ADVERTISE,
    GroupStage.SHARE.value: pb.TASK_KIND_SHARE,
    GroupStage.CONFIRM.value: pb.TASK_KIND_CONFIRM,
    GroupStage.REVEAL.value: pb.TASK_KIND_REVEAL,
}
"""Kind of task of each step of secure aggregation with neighbors; training is one like any other."""


def task_response(task: NextTask) -> pb.GetTaskResponse:
    """Encode a device's next task."""
    delay = values.duration(task.poll_delay_s)
    if task.measurement is not None:
        return pb.GetTaskResponse(
            kind=pb.TASK_KIND_EVALUATE,
            poll_delay=delay,
            training_session_id=task.measurement.training_session_id,
            base_version=task.measurement.version,
            base_digest=task.measurement.digest,
            transfer=task.measurement.transfer,
            evaluation_nonce=task.measurement.nonce,
        )
    if task.round is None or task.config is None:
        kind = pb.TASK_KIND_DONE if task.ended_session_id else pb.TASK_KIND_WAIT
        return pb.GetTaskResponse(
            kind=kind, poll_delay=delay, training_session_id=task.ended_session_id
        )
    return pb.GetTaskResponse(
        kind=_STEPS.get(task.step, pb.TASK_KIND_TRAIN),
        poll_delay=delay,
        training_session_id=task.round.training_session_id,
        round_number=task.round.number,
        base_version=task.round.base_version,
        base_digest=task.base_digest,
        deadline_time=values.timestamp(task.round.deadline_at),
        device_training=task.config.device_training,
        transfer=task.config.transfer,
        task=security_pb2.SignedEnvelope.FromString(task.round.task or b""),
        neighbors=task.neighbors,
    )


def _update_outcome(outcome: UpdateReceipt | QflareError) -> pb.UpdateOutcome:
    if isinstance(outcome, QflareError):
        return pb.UpdateOutcome(refusal=refusal_of(outcome))
    return pb.UpdateOutcome(receipt=versions.receipt(outcome))


class CoordinatorServicer(coordinator_service_pb2_grpc.CoordinatorServiceServicer):
    """The CoordinatorService servicer: decodes, calls one use case, encodes.

    Args:
        use_cases: The use cases.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._use_cases = use_cases

    def GetTask(self, request: pb.GetTaskRequest, context: ServicerContext) -> pb.GetTaskResponse:
        """Get the device's next task."""
        task = self._use_cases.tasks.next_task(
            current_call().device_id,
            request.training_session_id,
            trains_only=request.trains_only,
            answers_queries=request.answers_queries,
            first_member=request.first_member,
        )
        return task_response(task)

    def GetGlobalModel(
        self, request: pb.GetGlobalModelRequest, context: ServicerContext
    ) -> Iterator[pb.GetGlobalModelResponse]:
        """Download a version."""
        delivery = self._use_cases.deliveries.find(
            request.training_session_id,
            request.version if request.HasField("version") else None,
            released=request.released,
            known_version=request.known_version if request.HasField("known_version") else None,
            encoding=request.encoding,
        )
        sealed = self._use_cases.deliveries.wrapped_for(
            delivery, current_call().principal.device_id
        )
        chunks = self._use_cases.deliveries.chunks(delivery, request.first_chunk)
        first = pb.GetGlobalModelResponse(header=versions.model_header(delivery, sealed))
        yield from values.in_messages(pb.GetGlobalModelResponse, first, chunks)

    def SubmitUpdate(
        self, request_iterator: Iterator[pb.SubmitUpdateRequest], context: ServicerContext
    ) -> pb.SubmitUpdateResponse:
        """Upload an update."""
        header, first = split_header(request_iterator)
        rest, is_whole = rest_of(first, request_iterator)
        accepted = self._use_cases.uploads.submit(
            current_call().caller,
            _contributor(),
            header,
            chunks_of(first, rest),
            has_arrived=is_whole,
        )
        return versions.receipt(accepted)

    def SubmitUpdates(
        self, request: pb.SubmitUpdatesRequest, context: ServicerContext
    ) -> pb.SubmitUpdatesResponse:
        """Upload many small updates."""
        outcomes = self._use_cases.relayed.submit(
            current_call().caller, _contributor(), request.updates
        )
        return pb.SubmitUpdatesResponse(outcomes=[_update_outcome(each) for each in outcomes])

    def GetUpload(
        self, request: pb.GetUploadRequest, context: ServicerContext
    ) -> pb.GetUploadResponse:
        """Get the progress of an upload, to resume it."""
        next_chunk, known = self._use_cases.uploads.find(_contributor(), request.update_id)
        return pb.GetUploadResponse(
            next_chunk=next_chunk, receipt=None if known is None else versions.receipt(known)
        )

    def ReportEvaluation(
        self, request: pb.ReportEvaluationRequest, context: ServicerContext
    ) -> pb.ReportEvaluationResponse:
        """Report an evaluation."""
        self._use_cases.evaluations.report(current_call().caller, _contributor(), request.statement)
        return pb.ReportEvaluationResponse()

    def ReportFailure(
        self, request: pb.ReportFailureRequest, context: ServicerContext
    ) -> pb.ReportFailureResponse:
        """Report a failure."""
        call = current_call()
        self._use_cases.failures.report(
            call.caller,
            call.device_id,
            request.training_session_id,
            request.round_number,
            kind=request.kind,
            text=request.text,
        )
        return pb.ReportFailureResponse()

    def SecureAggregationStep(
        self, request: pb.SecureAggregationStepRequest, context: ServicerContext
    ) -> pb.SecureAggregationStepResponse:
        """Take a step of secure aggregation with neighbors."""
        self._use_cases.neighbor_steps.take(_contributor(), request)
        return pb.SecureAggregationStepResponse()

    def Heartbeat(
        self, request: pb.HeartbeatRequest, context: ServicerContext
    ) -> pb.HeartbeatResponse:
        """Record a heartbeat."""
        call = current_call()
        profile = profile_of(request.profile) if request.HasField("profile") else None
        beat = self._use_cases.devices.heartbeat(call.caller, call.device_id, profile)
        return pb.HeartbeatResponse(
            server_time=values.timestamp(beat.server_time),
            state=devices.device_state(beat.state),
            keyset_version=self._use_cases.enrollment.keyset_version,
            device_name=beat.device_name,
        )

    def FindTrainingSession(
        self, request: pb.FindTrainingSessionRequest, context: ServicerContext
    ) -> pb.FindTrainingSessionResponse:
        """Find a training session that the device refers to."""
        found = self._use_cases.tasks.find_session(current_call().device_id, request.reference)
        return pb.FindTrainingSessionResponse(training_session_id=found.id, name=found.name)

    def GetLineage(
        self, request: pb.GetLineageRequest, context: ServicerContext
    ) -> pb.GetLineageResponse:
        """Get the signed statements of consecutive versions."""
        statements = self._use_cases.deliveries.lineage(
            request.training_session_id,
            request.first_version,
            request.last_version if request.HasField("last_version") else None,
        )
        return pb.GetLineageResponse(statements=[values.envelope(*pair) for pair in statements])

    def GetContributionProof(
        self, request: pb.GetContributionProofRequest, context: ServicerContext
    ) -> pb.GetContributionProofResponse:
        """Get the proof that an update is in a version."""
        proof = self._use_cases.deliveries.contribution_proof(request.update_id)
        return pb.GetContributionProofResponse(
            version=proof.model.version,
            statement=values.envelope(proof.model.statement, proof.model.signature),
            proof=security_pb2.InclusionProof(
                leaf_index=proof.leaf_index,
                tree_size=proof.tree_size,
                sibling_digests=[sibling.hex() for sibling in proof.siblings],
            ),
        )

    def GetAuditHead(
        self, request: pb.GetAuditHeadRequest, context: ServicerContext
    ) -> pb.GetAuditHeadResponse:
        """Get the latest signed head of the audit log."""
        head, consistency = self._use_cases.audit.head(request.known_size)
        response = pb.GetAuditHeadResponse(head=head)
        if consistency is not None:
            response.consistency.CopyFrom(
                security_pb2.ConsistencyProof(
                    first_size=request.known_size,
                    second_size=consistency.second_size,
                    node_digests=[node.hex() for node in consistency.nodes],
                )
            )
        return response

    def GetKeyset(
        self, request: pb.GetKeysetRequest, context: ServicerContext
    ) -> pb.GetKeysetResponse:
        """Get the root documents and the keyset."""
        return pb.GetKeysetResponse(
            bundle=self._use_cases.enrollment.keyset(request.known_root_version),
            root_version=self._use_cases.enrollment.root_version,
        )

    def BeginRegistration(
        self, request: pb.BeginRegistrationRequest, context: ServicerContext
    ) -> pb.BeginRegistrationResponse:
        """Begin an enrollment."""
        challenge = self._use_cases.enrollment.begin(current_call().caller, request.enrollment)
        return pb.BeginRegistrationResponse(challenge=challenge)

    def Register(
        self, request: pb.RegisterRequest, context: ServicerContext
    ) -> pb.RegisterResponse:
        """Finish an enrollment."""
        enrolled = self._use_cases.enrollment.register(current_call().caller, request.confirmation)
        names = self._use_cases.devices.names_of([enrolled.device_id])
        return pb.RegisterResponse(
            receipt=enrolled.receipt,
            device_id=enrolled.device_id,
            device_name=names.get(enrolled.device_id, ""),
        )

    def BeginAuthentication(
        self, request: pb.BeginAuthenticationRequest, context: ServicerContext
    ) -> pb.BeginAuthenticationResponse:
        """Begin a login."""
        call = current_call()
        challenge = self._use_cases.login.begin(call.caller, request.hello, call.tls_group)
        return pb.BeginAuthenticationResponse(challenge=challenge)

    def Authenticate(
        self, request: pb.AuthenticateRequest, context: ServicerContext
    ) -> pb.AuthenticateResponse:
        """Finish a login."""
        grant = self._use_cases.login.authenticate(current_call().caller, request.proof)
        return pb.AuthenticateResponse(grant=grant)

    def RefreshToken(
        self, request: pb.RefreshTokenRequest, context: ServicerContext
    ) -> pb.RefreshTokenResponse:
        """Exchange a refresh token for new tokens."""
        grant = self._use_cases.login.refresh(current_call().caller, request.refresh)
        return pb.RefreshTokenResponse(grant=grant)

    def RotateKeys(
        self, request: pb.RotateKeysRequest, context: ServicerContext
    ) -> pb.RotateKeysResponse:
        """Rotate the keys of the calling device."""
        call = current_call()
        count = self._use_cases.key_rotations.rotate(call.caller, call.principal, request.rotation)
        return pb.RotateKeysResponse(key_rotation_count=count)
