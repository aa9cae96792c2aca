"""Small updates that arrive at the same time: taken by one thread, each answered as if it had come alone."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import select

from qflare.v1 import admin_service_pb2 as admin_pb
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_server.context import Telemetry
from qflare_server.serving.rpc import interceptor
from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.serving.rpc.small_updates import METHOD, SmallUpdates
from qflare_server.serving.rpc.thread_pools import FairPool
from qflare_server.storage.tables import AuditLog, ModelUpdate
from qflare_server.use_cases.access.rate_limits import RateLimiter
from tests.integration.conftest import Deployment
from tests.support.raw_device import Draft, RawDevice, reason_of

Deploy = Callable[..., Deployment]
WEIGHTS = {"w": np.ones(4, np.float32)}
ROUNDS = training_pb2.RoundPolicy(quorum=99, target=99, deadline=Duration(seconds=300))
TIMEOUT_S = 60.0


class Gate:
    """Holds the only thread of small updates, so that those that come meanwhile are taken together."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self._entered = threading.Semaphore(0)
        self._opened = threading.Event()

    def pass_through(self, count: int) -> None:
        self.batches.append(count)
        self._entered.release()
        assert self._opened.wait(TIMEOUT_S)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep the thread waiting from its first call, which the block sends, until the block ends."""
        self._opened.clear()
        try:
            yield
        finally:
            self._opened.set()

    def await_thread(self) -> None:
        assert self._entered.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, answer = Gate(), SmallUpdates.answer

    def held(small: SmallUpdates, calls: Sequence[IncomingCall]) -> Sequence[IncomingCall]:
        gate.pass_through(len(calls))
        return answer(small, calls)

    monkeypatch.setattr(SmallUpdates, "answer", held)
    return gate


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    deployment = deploy()
    deployment.coordinator._dispatcher._updates.thread_count = 1
    return deployment


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    return deployment.session(rounds=ROUNDS)


def devices(deployment: Deployment, count: int) -> list[RawDevice]:
    stub = deployment.devices_stub
    return [RawDevice(deployment.device(f"device-{number}"), stub) for number in range(count)]


def begin(device: RawDevice, draft: Draft) -> Any:
    """Send an update, and return its call."""
    return device.stub.SubmitUpdate.future(
        iter(list(device.messages(draft))), metadata=device.metadata, timeout=TIMEOUT_S
    )


def reason(call: Any) -> str:
    """Return the reason of a call's refusal, empty for a receipt."""
    error = call.exception()
    return "" if error is None else reason_of(error)


def await_queued(deployment: Deployment, count: int) -> None:
    """Wait until so many updates wait for the thread."""
    pool, waited = deployment.coordinator._dispatcher._updates, threading.Event()
    for _ in range(int(TIMEOUT_S / 0.01)):
        if pool._waiting_count == count:
            return
        waited.wait(0.01)
    raise TimeoutError(pool._waiting_count)


def gathered(
    deployment: Deployment, gate: Gate, plug: tuple[RawDevice, Draft], rest: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Send one update that holds the thread, and the others, which are taken together; return the calls."""
    first = begin(*plug)
    gate.await_thread()
    calls = [begin(device, draft) for device, draft in rest]
    await_queued(deployment, len(calls))
    return first, calls


def rows(deployment: Deployment) -> tuple[list[str], list[str]]:
    """Return the ids of accepted updates by sequence, and those of the audit log in its order."""
    with deployment.coordinator.parts.database.read() as session:
        accepted = session.scalars(
            select(ModelUpdate.id).order_by(ModelUpdate.acceptance_sequence)
        ).all()
        logged = session.scalars(
            select(AuditLog.subject)
            .where(AuditLog.event_type == "update.accepted")
            .order_by(AuditLog.id)
        ).all()
    return list(accepted), [subject.removeprefix("update:") for subject in logged]


def test_good_and_bad_updates_that_come_together_are_answered_apart(
    deployment: Deployment, session_id: str, gate: Gate
) -> None:
    plug, *others = devices(deployment, 8)
    task = plug.task(session_id)
    drafts = [device.draft(task, WEIGHTS) for device in others]
    drafts[1].payload = drafts[1].payload[:-1]
    drafts[2].statement.task_nonce = "0" * 64
    drafts[3].spoil_header = _spoil_signature
    drafts[4].statement.update_id = drafts[0].statement.update_id
    drafts[5].statement.base_version = 3
    with gate.closed():
        first, calls = gathered(
            deployment,
            gate,
            (plug, plug.draft(task, WEIGHTS)),
            list(zip(others, drafts, strict=True)),
        )
    reasons = [reason(call) for call in (first, *calls)]

    assert gate.batches == [1, 7]
    assert reasons == [
        "",
        "",
        "INVALID_UPDATE",
        "INVALID_REQUEST",
        "INVALID_SIGNATURE",
        "DUPLICATE_UPDATE",
        "STALE_BASE_VERSION",
        "",
    ]
    accepted, logged = rows(deployment)
    receipts = [call.result() for call in (first, *calls) if call.exception() is None]
    assert accepted == logged == [receipt.update_id for receipt in receipts]
    assert [receipt.acceptance_sequence for receipt in receipts] == [1, 2, 3]


def _spoil_signature(header: pb.UpdateHeader) -> None:
    header.statement.signatures[0].signature = bytes(3309)


def test_an_update_that_comes_twice_at_once_gets_one_receipt(
    deployment: Deployment, session_id: str, gate: Gate
) -> None:
    plug, device = devices(deployment, 2)
    task = plug.task(session_id)
    draft = device.draft(task, WEIGHTS)
    with gate.closed():
        _, calls = gathered(
            deployment, gate, (plug, plug.draft(task, WEIGHTS)), [(device, draft), (device, draft)]
        )
    receipts = [call.result() for call in calls]

    assert receipts[0] == receipts[1]
    assert len(rows(deployment)[0]) == 2


def test_a_device_that_is_revoked_while_its_update_waits_is_refused(
    deployment: Deployment, session_id: str, gate: Gate
) -> None:
    plug, revoked, other = devices(deployment, 3)
    task = plug.task(session_id)
    updates = [(device, device.draft(task, WEIGHTS)) for device in (plug, revoked, other)]
    with gate.closed():
        first, calls = gathered(deployment, gate, updates[0], updates[1:])
        request = admin_pb.RevokeDeviceRequest(
            device_id=revoked.identity.device_id, reason="stolen"
        )
        deployment.admin.RevokeDevice(request, metadata=deployment.metadata)

    assert [reason(call) for call in (first, *calls)] == ["", "DEVICE_REVOKED", ""]
    assert len(rows(deployment)[0]) == 2


def test_updates_that_wait_while_the_coordinator_drains_are_refused(
    deployment: Deployment, session_id: str, gate: Gate
) -> None:
    plug, other = devices(deployment, 2)
    task = plug.task(session_id)
    updates = [(device, device.draft(task, WEIGHTS)) for device in (plug, other)]
    draining = deployment.coordinator.draining
    try:
        with gate.closed():
            first, calls = gathered(deployment, gate, updates[0], updates[1:])
            draining.set()
        reasons = [reason(call) for call in (first, *calls)]
    finally:
        draining.clear()

    assert reasons == ["DRAINING", "DRAINING"]
    assert rows(deployment) == ([], [])


def test_a_coordinator_drains_after_the_updates_that_it_has_begun(
    deployment: Deployment, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (device,) = devices(deployment, 1)
    draft = device.draft(device.task(session_id), WEIGHTS)
    running = deployment.coordinator._boundary.running
    uploads = deployment.coordinator.use_cases.uploads
    accept, was_running = uploads.accept_all, []

    def accept_while_draining(taken: Any) -> Any:
        deployment.coordinator.draining.set()
        was_running.append(not running.wait_until_none(0.0))
        return accept(taken)

    monkeypatch.setattr(uploads, "accept_all", accept_while_draining)
    try:
        receipt = device.submit(draft)
    finally:
        deployment.coordinator.draining.clear()

    assert receipt.acceptance_sequence == 1
    assert was_running == [True]
    assert running.wait_until_none(TIMEOUT_S)


@pytest.mark.parametrize("spoil", [None, _spoil_signature])
def test_an_update_counts_once_for_the_rate_of_its_device(
    deployment: Deployment,
    session_id: str,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pb.UpdateHeader], None] | None,
) -> None:
    (device,) = devices(deployment, 1)
    draft = device.draft(device.task(session_id), WEIGHTS)
    if spoil is not None:
        draft.spoil_header = spoil
    taken, take = [], RateLimiter.take

    def counted(limiter: RateLimiter, caller: str) -> None:
        if limiter is deployment.coordinator._boundary.rates:
            taken.append(caller)
        take(limiter, caller)

    monkeypatch.setattr(RateLimiter, "take", counted)
    found = reason(begin(device, draft))

    assert found == ("INVALID_SIGNATURE" if spoil else "")
    assert taken == [f"device:{device.identity.device_id}"]


def test_a_device_beyond_its_rate_is_refused(deploy: Deploy) -> None:
    deployment = deploy(max_calls_per_second=0.5)
    session_id = deployment.session(rounds=ROUNDS)
    (device,) = devices(deployment, 1)
    draft = device.draft(device.task(session_id), WEIGHTS)
    reasons = [reason(begin(device, draft)) for _ in range(10)]

    assert reasons[0] == ""
    assert reasons[-1] == "TOO_MANY_REQUESTS"


def test_a_failure_of_one_update_leaves_the_others_alone(
    deployment: Deployment, session_id: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside the domain is INTERNAL for its own call, and the thread goes on."""
    plug, bad, good = devices(deployment, 3)
    task = plug.task(session_id)
    updates = [(device, device.draft(task, WEIGHTS)) for device in (plug, bad, good)]
    uploads = deployment.coordinator.use_cases.uploads
    take = uploads.take

    def fail_for_bad(arrival: Any) -> Any:
        if arrival.device.device_id == bad.identity.device_id:
            raise ZeroDivisionError
        return take(arrival)

    monkeypatch.setattr(uploads, "take", fail_for_bad)
    with gate.closed():
        first, calls = gathered(deployment, gate, updates[0], updates[1:])
    codes = [call.code() for call in (first, *calls)]

    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.OK]


def test_the_path_of_many_and_the_general_path_give_the_same_answers(
    deployment: Deployment, session_id: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    (device,) = devices(deployment, 1)
    foreign = deployment.session(rounds=ROUNDS, groups=["ward"])
    task = device.task(session_id)
    streams = [_stream(device, task, spoil) for spoil in _SPOILED]
    streams += [[b"\xff"], [], [b""], [*streams[0], *streams[0]]]
    streams.append(_stream(device, task, lambda draft, _: _rename(draft, foreign)))
    metadata = tuple(device.metadata)
    credentials = [(), (("authorization", "Bearer nonsense"),), metadata * 2, deployment.metadata]
    questions = [(metadata, stream) for stream in streams]
    questions += [(other, streams[0]) for other in credentials]
    with gate.closed():
        gate._opened.set()
        with caplog.at_level(logging.DEBUG, interceptor.logger.name):  # it logs each call
            generally = [_outcome(deployment, *question) for question in questions]
        assert gate.batches == []
        together = [_outcome(deployment, *question) for question in questions]

    assert together == generally
    assert len(gate.batches) >= len(_SPOILED)


def _nothing(_draft: Draft, _message: pb.SubmitUpdateRequest) -> None:
    """Spoil nothing: the last one is accepted, so that a repetition is answered alike."""


def _rename(draft: Draft, session_id: str) -> None:
    draft.statement.training_session_id = session_id


_SPOILED: Sequence[Callable[[Draft, pb.SubmitUpdateRequest], object]] = (
    lambda _, message: message.ClearField("header"),
    lambda _, message: message.ClearField("chunk"),
    lambda _, message: setattr(message.chunk, "index", 1),
    lambda _, message: setattr(message.header.statement, "payload", b"\xff"),
    lambda _, message: message.header.statement.ClearField("signatures"),
    lambda draft, _: setattr(draft.statement, "realm", "elsewhere"),
    lambda draft, _: setattr(draft.statement, "round_number", 7),
    lambda draft, _: setattr(draft.statement, "size_bytes", 2**40),
    _nothing,
)


def _stream(
    device: RawDevice,
    task: pb.GetTaskResponse,
    spoil: Callable[[Draft, pb.SubmitUpdateRequest], object],
) -> list[bytes]:
    """Return an update as bytes; what is spoiled of its statement is signed."""
    draft = device.draft(task, WEIGHTS)
    spoil(draft, pb.SubmitUpdateRequest())
    (message,) = device.messages(draft)
    spoil(draft, message)
    return [message.SerializeToString()]


def _outcome(deployment: Deployment, metadata: Any, stream: list[bytes]) -> Any:
    """Return the receipt, or the code, the text and the reason of the refusal."""
    send: Any = deployment.channel.stream_unary(METHOD)
    try:
        return send(iter(stream), metadata=metadata, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code(), error.details(), reason_of(error)


def test_where_spans_are_recorded_each_update_takes_the_general_path(deploy: Deploy) -> None:
    class Spans(Telemetry):
        records_spans = True

    deployment = deploy()
    context = deployment.coordinator.parts.context
    traced = type(context)(**{**vars(context), "telemetry": Spans()})
    boundary = deployment.coordinator._boundary
    small = SmallUpdates(traced, deployment.coordinator.use_cases, boundary)

    assert not small._is_on
    assert SmallUpdates(context, deployment.coordinator.use_cases, boundary)._is_on


def test_the_pool_hands_out_waiting_calls_fairly_and_up_to_its_limit(
    deployment: Deployment, session_id: str, gate: Gate
) -> None:
    """A device with several calls does not push out those of others."""
    plug, greedy, modest = devices(deployment, 3)
    task = plug.task(session_id)
    pool = deployment.coordinator._dispatcher._updates
    pool._limit = 2
    greedy_updates = [(greedy, greedy.draft(task, WEIGHTS)) for _ in range(3)]
    modest_update = (modest, modest.draft(task, WEIGHTS))
    with gate.closed():
        _, calls = gathered(
            deployment, gate, (plug, plug.draft(task, WEIGHTS)), [*greedy_updates, modest_update]
        )
    reasons = [reason(call) for call in calls]

    assert gate.batches == [1, 2, 2]
    assert reasons.count("") == 2
    assert calls[-1].result().acceptance_sequence == 3
    assert isinstance(pool, FairPool)
