"""What a device reaches of training sessions, versions and updates that are not for it, over every method there is."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import select

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import device_pb2, security_pb2, training_pb2
from qflare_client import Client, InvalidRequestError
from qflare_server.storage.tables import Upload
from qflare_server.use_cases.access.objects import RULES, names_nothing, own_only
from qflare_server.use_cases.access.roles import ACCESS, Role
from tests.support.raw_device import Draft, RawDevice, reason_of

Deploy = Callable[..., Any]
ROUNDS = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
HIDDEN = "TRAINING_SESSION_NOT_FOUND"
COORDINATOR = "/qflare.v1.CoordinatorService/"
OUTSIDE = "00000000-0000-4000-8000-000000000000"
ZEROS = {"w": np.zeros(4, np.float32)}


def enrolled(deployment: Any, name: str, *groups: str, **enrollment: Any) -> RawDevice:
    """Return a device that has enrolled with a token for groups."""
    client: Client = deployment.device(name, groups=groups, **enrollment)
    return RawDevice(client, deployment.devices_stub)


def refused(call: Callable[[], Any]) -> str:
    """Return the machine word with which a call is refused, or its only update where it carries updates."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return reason_of(error)
    assert isinstance(answer, pb.SubmitUpdatesResponse), "the call is not refused"
    (outcome,) = answer.outcomes
    assert outcome.HasField("refusal")
    return str(outcome.refusal.reason)


def download(device: RawDevice, session_id: str, **wanted: Any) -> list[Any]:
    request = pb.GetGlobalModelRequest(training_session_id=session_id, **wanted)
    return list(device.stub.GetGlobalModel(request, metadata=device.metadata))


def find(device: RawDevice, reference: str) -> pb.FindTrainingSessionResponse:
    request = pb.FindTrainingSessionRequest(reference=reference)
    found: pb.FindTrainingSessionResponse = device.stub.FindTrainingSession(
        request, metadata=device.metadata
    )
    return found


def administer(deployment: Any, method: str, **fields: Any) -> Any:
    request = getattr(admin_pb2, f"{method}Request")(**fields)
    return getattr(deployment.admin, method)(request, metadata=deployment.metadata)


class Reach:
    """Every method of a device that names a training session or an update, called for one of each."""

    def __init__(self, device: RawDevice, insider: RawDevice, session_id: str, update: Any) -> None:
        self._device = device
        self._insider = insider
        self._session_id = session_id
        self._update = update

    def __call__(self, method: str) -> Any:
        """Call a method by its short name."""
        call = getattr(self, f"_{method}", None)
        if call is None:
            pytest.fail(f"{method} has no call here: say how it is called for what is another's")
        return call()

    def _GetTask(self) -> Any:
        return self._device.task(self._session_id)

    def _GetGlobalModel(self) -> Any:
        return download(self._device, self._session_id)

    def _GetLineage(self) -> Any:
        request = pb.GetLineageRequest(training_session_id=self._session_id)
        return self._device.stub.GetLineage(request, metadata=self._device.metadata)

    def _draft(self) -> Draft:
        draft = self._insider.draft(self._insider.task(self._session_id), ZEROS)
        draft.statement.device_id = self._device.identity.device_id
        draft.statement.key_id = self._device.identity.keys.signing.public.key_id
        return draft

    def _SubmitUpdate(self) -> Any:
        return self._device.submit(self._draft())

    def _SubmitUpdates(self) -> Any:
        draft = self._draft()
        update = pb.SmallUpdate(header=self._device.header(draft), payload=draft.payload)
        request = pb.SubmitUpdatesRequest(updates=[update])
        return self._device.stub.SubmitUpdates(request, metadata=self._device.metadata)

    def _ReportEvaluation(self) -> Any:
        key = self._device.identity.keys.signing
        statement = security_pb2.EvaluationStatement(
            realm="qflare",
            training_session_id=self._session_id,
            version_digest="0" * 64,
            evaluation_nonce="0" * 64,
            device_id=self._device.identity.device_id,
            key_id=key.public.key_id,
            example_count=1,
        )
        signed = sign_envelope(key, SigningContext.EVALUATION, statement)
        request = pb.ReportEvaluationRequest(statement=signed)
        return self._device.stub.ReportEvaluation(request, metadata=self._device.metadata)

    def _ReportFailure(self) -> Any:
        request = pb.ReportFailureRequest(training_session_id=self._session_id, kind="Error")
        return self._device.stub.ReportFailure(request, metadata=self._device.metadata)

    def _SecureAggregationStep(self) -> Any:
        key = self._device.identity.keys.signing
        statement = security_pb2.NeighborAdvertisement(
            realm="qflare",
            training_session_id=self._session_id,
            round_number=1,
            task_digest="0" * 64,
            device_id=self._device.identity.device_id,
            key_id=key.public.key_id,
            channel_key=self._device.identity.keys.kem.public.to_proto(),
            mask_key=self._device.identity.keys.kem.public.to_proto(),
            self_seed_digest="0" * 64,
            nonce=bytes(32),
        )
        signed = sign_envelope(key, SigningContext.NEIGHBOR_ADVERTISEMENT, statement)
        request = pb.SecureAggregationStepRequest(advertisement=signed)
        return self._device.stub.SecureAggregationStep(request, metadata=self._device.metadata)

    def _GetContributionProof(self) -> Any:
        request = pb.GetContributionProofRequest(update_id=self._update)
        return self._device.stub.GetContributionProof(request, metadata=self._device.metadata)


def walked() -> list[str]:
    """Return the short names of the methods that devices may call and that are for something."""
    return [
        method.removeprefix(COORDINATOR)
        for method, rule in sorted(RULES.items())
        if Role.DEVICE in ACCESS[method] and rule not in {names_nothing, own_only}
    ]


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy()


def test_whoever_is_outside_reaches_nothing_by_any_method(deployment: Any) -> None:
    insider, outsider = enrolled(deployment, "in", "ward-3"), enrolled(deployment, "out", "ward-4")
    session_id = deployment.session(rounds=ROUNDS, total_rounds=9, groups=["ward-3"])
    draft = insider.draft(insider.task(session_id), ZEROS)
    update_id = insider.submit(draft).update_id
    while insider.task(session_id).round_number != 2:
        pass
    foreign = Reach(outsider, insider, session_id, update_id)
    missing = Reach(outsider, insider, OUTSIDE, OUTSIDE)
    own = Reach(insider, insider, session_id, update_id)

    for method in walked():
        if method not in {
            "SubmitUpdate",
            "SubmitUpdates",
            "ReportEvaluation",
            "SecureAggregationStep",  # the session has no neighbors
        }:  # the insider's own are accepted below
            own(method)
        reason = refused(partial(foreign, method))
        assert reason.endswith("_NOT_FOUND"), method
        if method not in {
            "SubmitUpdate",
            "SubmitUpdates",
        }:  # its header follows from a task, which there is none of
            assert refused(partial(missing, method)) == reason, (
                method
            )  # nobody learns what there is

    upload = pb.GetUploadRequest(update_id=update_id)
    found = outsider.stub.GetUpload(upload, metadata=outsider.metadata)
    assert found == pb.GetUploadResponse()
    assert outsider.task().kind == pb.TASK_KIND_WAIT
    own("SubmitUpdate")


def test_a_device_finds_its_own_training_sessions_by_id_beginning_and_name(
    deployment: Any,
) -> None:
    insider, outsider = enrolled(deployment, "in", "ward-3"), enrolled(deployment, "out", "ward-4")
    other = deployment.session(rounds=ROUNDS, groups=["ward-4"])
    session_id = deployment.session(rounds=ROUNDS, groups=["ward-3"])

    for reference in (session_id, session_id[:8], "test"):
        assert insider.client.find_session(reference) == session_id
        assert find(insider, reference).name == "test"
    for hidden in (other, other[:8], "tes", OUTSIDE):
        assert refused(partial(find, insider, hidden)) == HIDDEN
    deployment.session(rounds=ROUNDS, groups=["ward-3"])
    with pytest.raises(InvalidRequestError, match=f"test \\({session_id}\\)") as several:
        insider.client.find_session("test")
    assert other not in str(several.value)
    assert outsider.client.find_session("test") == other


def test_every_method_that_is_for_something_is_walked() -> None:
    assert walked() == sorted(
        name[1:] for name in vars(Reach) if name.startswith("_") and name[1].isupper()
    )


def test_a_token_for_no_group_enrols_a_device_of_none(deployment: Any) -> None:
    device = enrolled(deployment, "plain")
    closed = deployment.session(rounds=ROUNDS, groups=["ward-3"])
    everybody = deployment.session(rounds=ROUNDS)

    assert refused(partial(device.task, closed)) == HIDDEN
    assert device.task().training_session_id == everybody
    assert download(device, everybody)


def test_groups_are_given_and_taken_later(deployment: Any) -> None:
    device = enrolled(deployment, "a", "ward-4")
    device_id = device.identity.device_id
    session_id = deployment.session(rounds=ROUNDS, groups=["ward-3", "ward-5"])
    assert refused(partial(download, device, session_id)) == HIDDEN

    changed = administer(deployment, "SetDeviceGroups", device_id=device_id, groups=["ward-3"])
    assert list(changed.device.groups) == ["ward-3"]
    assert download(device, session_id)
    assert device.task().training_session_id == session_id
    listed = administer(deployment, "ListDevices", group="ward-3")
    assert [item.device_id for item in listed.devices] == [device_id]

    administer(deployment, "SetDeviceGroups", device_id=device_id)
    assert refused(partial(download, device, session_id)) == HIDDEN
    assert device.task().kind == pb.TASK_KIND_WAIT
    assert not administer(deployment, "ListDevices", group="ward-3").devices


def begun(deployment: Any) -> bool:
    """Return whether an upload is under way."""
    with deployment.coordinator.parts.database.read() as session:
        return session.execute(select(Upload)).first() is not None


def test_whoever_leaves_a_group_in_the_middle_of_an_upload_is_refused(deployment: Any) -> None:
    device = enrolled(deployment, "a", "ward-3")
    session_id = deployment.session(
        {"w": np.zeros(2**21, np.float32)}, rounds=ROUNDS, groups=["ward-3"]
    )
    draft = device.draft(device.task(session_id), {"w": np.zeros(2**21, np.float32)})

    def messages() -> Any:
        for number, message in enumerate(device.messages(draft)):
            if number == 7:
                while not begun(deployment):  # the header has been checked once it has
                    threading.Event().wait(0.01)
                administer(deployment, "SetDeviceGroups", device_id=device.identity.device_id)
            yield message

    submit = partial(device.stub.SubmitUpdate, messages(), metadata=device.metadata, timeout=30)

    assert refused(submit) == HIDDEN


def test_no_version_is_handed_out_before_the_start(deployment: Any) -> None:
    device = enrolled(deployment, "a")
    session_id = deployment.session(start=False, rounds=ROUNDS)

    assert refused(partial(download, device, session_id)) == "GLOBAL_MODEL_NOT_FOUND"
    assert refused(partial(download, device, session_id, version=0)) == "GLOBAL_MODEL_NOT_FOUND"
    assert refused(partial(download, device, session_id, released=True)) == "GLOBAL_MODEL_NOT_FOUND"
    lineage = Reach(device, device, session_id, "")
    assert refused(partial(lineage, "GetLineage")) == "GLOBAL_MODEL_NOT_FOUND"
    assert device.task(session_id).kind == pb.TASK_KIND_WAIT

    administer(deployment, "StartTrainingSession", training_session_id=session_id)
    assert download(device, session_id, version=0)
    lineage("GetLineage")


@pytest.mark.parametrize("sealed", [False, True])
def test_a_device_that_a_session_does_not_ask_for_gets_no_version(
    deployment: Any, sealed: bool
) -> None:
    server = enrolled(deployment, "a", device_type="server", capabilities={"ram_mib": 4096})
    phone = enrolled(deployment, "b", device_type="phone", capabilities={"ram_mib": 4096})
    small = enrolled(deployment, "c", device_type="server", capabilities={"ram_mib": 512})
    selection = training_pb2.SelectionPolicy(
        device_types=["server"],
        capabilities=[training_pb2.CapabilityFilter(capability="ram_mib", value=1024)],
    )
    session_id = deployment.session(rounds=ROUNDS, selection=selection, transfer={"sealed": sealed})

    assert download(server, session_id)
    for device in (phone, small):
        assert refused(partial(download, device, session_id)) == HIDDEN


def test_a_heartbeat_changes_nothing_that_selection_goes_by(deployment: Any) -> None:
    phone = enrolled(deployment, "a", device_type="phone", capabilities={"ram_mib": 512})
    session_id = deployment.session(
        rounds=ROUNDS, selection=training_pb2.SelectionPolicy(device_types=["server"])
    )
    boast = device_pb2.DeviceProfile(device_type="server", capabilities={"ram_mib": 1e6})
    phone.client.heartbeat(boast)
    again = deployment.session(
        rounds=ROUNDS, selection=training_pb2.SelectionPolicy(device_types=["server"])
    )

    for closed in (session_id, again):
        assert refused(partial(phone.task, closed)) == HIDDEN
    assert phone.task().kind == pb.TASK_KIND_WAIT
    device_id = phone.identity.device_id
    shown = administer(deployment, "GetDevice", device_id=device_id).device
    assert (shown.profile.device_type, shown.reported_type) == ("phone", "server")
    assert dict(shown.profile.capabilities) == {"ram_mib": 512}
    assert dict(shown.reported_capabilities) == {"ram_mib": 1e6}
    assert not administer(deployment, "ListDevices", device_type="server").devices

    confirmed = administer(
        deployment,
        "ConfirmDeviceProfile",
        device_id=device_id,
        device_type="server",
        capabilities={"ram_mib": 2048},
    ).device
    assert (confirmed.profile.device_type, confirmed.HasField("confirm_time")) == ("server", True)
    assert download(phone, again)
    assert phone.task(again).kind == pb.TASK_KIND_WAIT  # its round has drawn nobody


def test_a_session_may_ask_for_confirmed_devices(deployment: Any) -> None:
    stated, confirmed = (enrolled(deployment, name, device_type="server") for name in ("a", "b"))
    device_id = confirmed.identity.device_id
    administer(deployment, "ConfirmDeviceProfile", device_id=device_id, device_type="server")
    session_id = deployment.session(
        rounds=ROUNDS,
        selection=training_pb2.SelectionPolicy(device_types=["server"], confirmed_only=True),
    )

    assert refused(partial(stated.task, session_id)) == HIDDEN
    assert confirmed.task(session_id).kind == pb.TASK_KIND_TRAIN


def test_who_is_not_drawn_sees_released_versions_alone(deployment: Any) -> None:
    devices = [enrolled(deployment, name) for name in ("a", "b")]
    session_id = deployment.session(
        rounds=ROUNDS,
        selection=training_pb2.SelectionPolicy(device_count=1, seed=1),
        release=training_pb2.ReleasePolicy(
            bounds=[training_pb2.MetricBound(metric="accuracy", min_value=0.9)]
        ),
    )
    drawn, other = sorted(devices, key=lambda device: device.task(session_id).kind, reverse=True)
    assert drawn.task(session_id).kind == pb.TASK_KIND_TRAIN
    assert download(drawn, session_id)
    for wanted in ({}, {"version": 0}, {"released": True}):
        assert refused(partial(download, other, session_id, **wanted)) == "GLOBAL_MODEL_NOT_FOUND"

    administer(deployment, "ReleaseGlobalModel", training_session_id=session_id, version=0)

    assert download(other, session_id, version=0)
    assert download(other, session_id, released=True)
    assert refused(partial(download, other, session_id)) == "GLOBAL_MODEL_NOT_FOUND"


def test_a_new_method_without_a_rule_cannot_be_called(
    deployment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = enrolled(deployment, "a")
    monkeypatch.delitem(RULES, COORDINATOR + "GetTask")

    assert refused(device.task) == "PERMISSION_DENIED"


NO_GROUPS = (
    ["Ward"],
    ["-ward"],
    ["ward 3"],
    [""],
    ["a" * 64],
    ["w\x00"],
    [f"group-{number}" for number in range(33)],
)


def test_what_is_no_group_is_refused(deployment: Any) -> None:
    device_id = enrolled(deployment, "a").identity.device_id
    for groups in NO_GROUPS:
        config = training_pb2.TrainingConfig(groups=groups)
        for call in (
            partial(administer, deployment, "SetDeviceGroups", device_id=device_id, groups=groups),
            partial(administer, deployment, "IssueEnrollmentTokens", groups=groups),
            partial(administer, deployment, "CreateTrainingSession", name="test", config=config),
        ):
            assert refused(call) == "INVALID_REQUEST", groups


def test_a_token_for_lost_keys_gives_no_groups(deployment: Any) -> None:
    device_id = enrolled(deployment, "a").identity.device_id
    issue = partial(administer, deployment, "IssueEnrollmentTokens", device_id=device_id)

    assert refused(partial(issue, groups=["ward-3"])) == "INVALID_REQUEST"
    assert issue().tokens
