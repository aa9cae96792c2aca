"""Polls of devices that have nothing to do: no query, and every change is seen in time, whoever makes it."""

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import coordinator_service_pb2 as device_calls
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    DeviceRevokedError,
    DeviceSuspendedError,
    NotFoundError,
    TaskKind,
)
from qflare_server.serving.rpc import interceptor
from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.serving.rpc.thread_pools import FairPool
from qflare_server.storage.epochs import MAX_AGE_S
from tests.support.queries import counted_queries
from tests.support.raw_device import RawDevice, reason_of
from tests.support.steady_time import SteadyTime

Deploy = Callable[..., Any]
Pair = tuple[Any, Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
POLLS = 50


@pytest.fixture
def steady_time() -> SteadyTime:
    return SteadyTime()


@pytest.fixture
def pair(deploy: Deploy, steady_time: SteadyTime) -> Pair:
    """Return two coordinators on one database; the snapshots of the first age as the test says."""
    first, second = deploy(lease_s=1.0), deploy(lease_s=1.0)
    first.coordinator.parts.database._epochs._monotonic = steady_time
    return first, second


def call(deployment: Any, method: str, /, **fields: Any) -> Any:
    request = getattr(pb, f"{method}Request")(**fields)
    return getattr(deployment.admin, method)(request, metadata=deployment.metadata)


def finish(client: Client, session_id: str) -> None:
    """Do a device's task, so that it has nothing more to do until the version is there."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    client.submit(task, base, base.arrays, example_count=1)


@pytest.mark.parametrize("names_session", [False, True])
def test_an_idle_poll_sends_no_query(pair: Pair, names_session: bool) -> None:
    first, _ = pair
    with first.device("a") as client:
        session_id = first.session(rounds=ONE_DEVICE, start=False)
        asked = session_id if names_session else None
        assert client.get_task(asked).kind is TaskKind.WAIT
        with counted_queries(first) as queries:
            kinds = {client.get_task(asked).kind for _ in range(POLLS)}
        assert kinds == {TaskKind.WAIT}
        assert queries == []


def test_what_another_process_does_costs_one_read_for_each_second(
    pair: Pair, steady_time: SteadyTime
) -> None:
    first, second = pair
    with first.device("a") as client:
        client.get_task()
        second.device("b").close()
        steady_time.advance(MAX_AGE_S)
        client.get_task()
        with counted_queries(first) as queries:
            for _ in range(POLLS):
                client.get_task()
        assert queries == []


class Change:
    """A change that a waiting device has to be told of: made at a coordinator, seen by the client of the first."""

    def __init__(self, first: Any, client: Client) -> None:
        self.first = first
        self.client = client
        self.session_id = first.session(rounds=ONE_DEVICE, start=False)
        assert client.get_task().kind is TaskKind.WAIT
        assert client.get_task(self.session_id).kind is TaskKind.WAIT

    def new_training_session(self, by: Any) -> Callable[[], None]:
        call(by, "StartTrainingSession", training_session_id=self.session_id)
        return lambda: self.expect(TaskKind.TRAIN)

    def canceled_training_session(self, by: Any) -> Callable[[], None]:
        call(by, "CancelTrainingSession", training_session_id=self.session_id)
        return lambda: self.expect(TaskKind.DONE, named_only=True)

    def revocation(self, by: Any) -> Callable[[], None]:
        call(by, "RevokeDevice", device_id=self.client.device_id, reason="stolen")
        return lambda: self.expect_refusal(DeviceRevokedError)

    def suspension(self, by: Any) -> Callable[[], None]:
        call(by, "SuspendDevice", device_id=self.client.device_id)
        return lambda: self.expect_refusal(DeviceSuspendedError)

    def expect(self, kind: TaskKind, *, named_only: bool = False) -> None:
        assert self.client.get_task(self.session_id).kind is kind
        if not named_only:
            assert self.client.get_task().kind is kind

    def expect_refusal(self, error: type[Exception]) -> None:
        for asked in (None, self.session_id):
            with pytest.raises(error):
                self.client.get_task(asked)


@pytest.mark.parametrize("by_other", [False, True], ids=["own-process", "other-process"])
@pytest.mark.parametrize(
    "make",
    [
        Change.new_training_session,
        Change.canceled_training_session,
        Change.revocation,
        Change.suspension,
    ],
)
def test_a_poll_sees_each_change(
    pair: Pair,
    steady_time: SteadyTime,
    make: Callable[[Change, Any], Callable[[], None]],
    by_other: bool,
) -> None:
    first, second = pair
    with first.device("a") as client:
        check = make(Change(first, client), second if by_other else first)
        if by_other:
            steady_time.advance(MAX_AGE_S)
        check()


def test_a_poll_sees_a_new_version(pair: Pair, steady_time: SteadyTime) -> None:
    """Whichever of the two coordinators publishes it."""
    first, second = pair
    rounds = training_pb2.RoundPolicy(quorum=2, deadline=Duration(seconds=60))
    first.device("b").close()
    with first.device("a") as waiting:
        session_id = first.session(rounds=rounds)
        finish(waiting, session_id)
        assert waiting.get_task(session_id).kind is TaskKind.WAIT
        watch = pb.WatchTrainingSessionRequest(training_session_id=session_id)
        events = first.admin.WatchTrainingSession(watch, metadata=first.metadata, timeout=60)
        next(events)
        with Client(home=first.folder / "b", address=second.coordinator.address) as other:
            finish(other, session_id)
        opened = pb.TRAINING_SESSION_EVENT_KIND_ROUND_OPENED
        next(one for one in events if one.kind == opened)
        events.cancel()
        steady_time.advance(MAX_AGE_S)
        assert waiting.get_task(session_id).round_number == 2


def test_a_device_that_leaves_a_group_loses_its_training_session(
    pair: Pair, steady_time: SteadyTime
) -> None:
    first, second = pair
    with first.device("a", groups=["ward"]) as client:
        session_id = first.session(rounds=ONE_DEVICE, start=False, groups=["ward"])
        client.get_task(session_id)
        call(second, "SetDeviceGroups", device_id=client.device_id, groups=[])
        steady_time.advance(MAX_AGE_S)
        with pytest.raises(NotFoundError):
            client.get_task(session_id)


def test_only_polls_may_be_behind(pair: Pair) -> None:
    """A device that another process has revoked may get WAIT for a while, and nothing else at all."""
    first, second = pair
    with first.device("a") as client:
        session_id = first.session(rounds=ONE_DEVICE)
        task = client.get_task(session_id)
        finish(client, session_id)
        call(second, "RevokeDevice", device_id=client.device_id, reason="stolen")
        for refused in (
            client.heartbeat,
            lambda: client.download(session_id),
            lambda: client.report_failure(task, "OutOfMemory"),
        ):
            with pytest.raises(DeviceRevokedError):
                refused()


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the methods of the calls that a thread is asked to answer, as they come."""
    methods: list[str] = []
    put = FairPool.put

    def note(pool: FairPool, call: IncomingCall) -> bool:
        methods.append(call.route.method.rpartition("/")[2])
        return put(pool, call)

    monkeypatch.setattr(FairPool, "put", note)
    return methods


@pytest.fixture
def raw(pair: Pair) -> RawDevice:
    """Return a device at the first coordinator, which has asked for a task and has none."""
    client = pair[0].device("raw")
    raw = RawDevice(client, pair[0].devices_stub)
    assert poll(raw).kind == device_calls.TASK_KIND_WAIT
    return raw


def poll(raw: RawDevice, *metadata: tuple[str, str], **fields: Any) -> Any:
    request = device_calls.GetTaskRequest(**fields)
    return raw.stub.GetTask(request, metadata=metadata or raw.metadata, timeout=60)


def test_an_idle_poll_takes_no_thread(raw: RawDevice, queued: list[str]) -> None:
    assert {poll(raw).kind for _ in range(POLLS)} == {device_calls.TASK_KIND_WAIT}
    assert queued == []


def test_a_poll_with_a_task_takes_a_thread(pair: Pair, raw: RawDevice, queued: list[str]) -> None:
    pair[0].session(rounds=ONE_DEVICE)
    queued.clear()
    assert poll(raw).kind == device_calls.TASK_KIND_TRAIN
    assert queued == ["GetTask"]


def test_the_end_of_a_session_is_told_with_its_id(pair: Pair, raw: RawDevice) -> None:
    ended = [pair[0].session(rounds=ONE_DEVICE, start=False) for _ in range(2)]
    for session_id in ended:
        call(pair[0], "CancelTrainingSession", training_session_id=session_id)
    for session_id in (*ended, *ended):  # the second time from memory
        answer = poll(raw, training_session_id=session_id)
        assert answer.kind == device_calls.TASK_KIND_DONE
        assert answer.training_session_id == session_id


def outcome(deployment: Any, metadata: Sequence[tuple[str, str | bytes]], data: bytes) -> Any:
    """Return the response to the bytes of a poll, or the code and the reason of its refusal."""
    send = deployment.channel.unary_unary("/qflare.v1.CoordinatorService/GetTask")
    try:
        return device_calls.GetTaskResponse.FromString(send(data, metadata=metadata, timeout=60))
    except grpc.RpcError as error:
        return error.code(), reason_of(error)


def test_memory_and_the_general_path_give_the_same_answers(
    pair: Pair, raw: RawDevice, queued: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks, and whatever: what memory does not know for certain it leaves to the general path."""
    first, _ = pair
    own = first.session(rounds=ONE_DEVICE, start=False)
    ended = first.session(rounds=ONE_DEVICE, start=False)
    call(first, "CancelTrainingSession", training_session_id=ended)
    foreign = first.session(rounds=ONE_DEVICE, start=False, groups=["ward"])
    revoked, suspended = (RawDevice(first.device(name), first.devices_stub) for name in "rs")
    for other in (revoked, suspended):
        poll(other)
    call(first, "RevokeDevice", device_id=revoked.client.device_id, reason="stolen")
    call(first, "SuspendDevice", device_id=suspended.client.device_id)
    token = tuple(raw.metadata)
    callers = [
        token,
        token * 2,
        (),
        (("authorization", "Bearer nonsense"),),
        (("authorization", "Bearer " + "x" * 300),),
        tuple(revoked.metadata),
        tuple(suspended.metadata),
        first.metadata,
    ]
    asked = ["", own, ended, foreign, str(uuid.uuid4()), "x" * 300, "a\0b"]
    requests = [
        device_calls.GetTaskRequest(training_session_id=text, trains_only=trains_only)
        for text in asked
        for trains_only in (False, True)
    ]
    messages = [request.SerializeToString() for request in requests]
    messages += [b"\xff", b"\x0a\x02\xc3\x28"]
    questions = [(token, data) for data in messages]
    questions += [(metadata, messages[0]) for metadata in callers]
    with caplog.at_level(logging.DEBUG, interceptor.logger.name):  # the general path logs each call
        generally = [outcome(first, *question) for question in questions]
    queued.clear()
    from_memory = [outcome(first, *question) for question in questions]
    assert from_memory == generally
    answered = len([found for found in generally if not isinstance(found, tuple)])
    assert queued.count("GetTask") <= len(questions) - answered


def test_idle_polls_count_for_the_rate_of_their_device(deploy: Deploy) -> None:
    deployment = deploy(max_calls_per_second=0.1)
    raw = RawDevice(deployment.device("raw"), deployment.devices_stub)
    found = [outcome(deployment, raw.metadata, b"") for _ in range(20)]
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS") in found


def test_a_draining_coordinator_answers_no_poll(pair: Pair, raw: RawDevice) -> None:
    pair[0].coordinator.draining.set()
    try:
        code, _ = outcome(pair[0], raw.metadata, b"")
    finally:
        pair[0].coordinator.draining.clear()
    assert code is grpc.StatusCode.UNAVAILABLE


def test_idle_polls_behind_a_proxy_are_proven(deploy: Deploy) -> None:
    """Where calls have to prove possession of a key, a token alone gets no answer from memory either."""
    deployment = deploy(require_pop=True)
    deployment.device("a").close()
    with Client(home=deployment.folder / "a", proof_of_possession=True) as client:
        assert client.get_task().kind is TaskKind.WAIT
        assert client.get_task().kind is TaskKind.WAIT
        proven = client._login.metadata("/x", device_calls.GetTaskRequest())
        token = [pair for pair in proven if pair[0] == "authorization"]
        code, _ = outcome(deployment, token, b"")
        assert code is grpc.StatusCode.UNAUTHENTICATED
