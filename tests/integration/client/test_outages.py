"""Lines that are slow, silent or cut, tokens that end on the way, proxies, and loops that are told to end."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo

from qflare.tensors import CHUNK_BYTES, Array, Manifest
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import training_pb2
from qflare_client import (
    Client,
    KeyStoreLockedError,
    ProxyRefusedError,
    RetryPolicy,
    RunSummary,
    TlsError,
    TrainingTask,
    UnavailableError,
    enroll,
    run,
)
from qflare_client.keystore.store import KeyStore
from qflare_client.models.upload import Payload, Upload
from qflare_client.rpc import lifetime
from qflare_client.rpc.caller import Attempts, Calls
from qflare_client.rpc.tls import Tls
from qflare_client.rpc.transport import Transport
from tests.integration.client.conftest import Scripted, fail
from tests.integration.client.test_transfers import (
    STATEMENT,
    UPDATE_ID,
    Downloads,
    Uploads,
    arrays_of,
    assert_same,
    download,
    payload_of,
)
from tests.support.line import Line
from tests.support.proxy import refusing_proxy

Deploy = Callable[..., Any]
MakeCalls = Callable[..., Calls]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
CHUNKS = 6
SUBMIT = "SubmitUpdate"


class Trainer:
    """A training function that counts how often it is called, and says when."""

    def __init__(self) -> None:
        self.count = 0
        self.called = threading.Event()

    def __call__(self, arrays: dict[str, Array], _: TrainingTask) -> Any:
        self.count += 1
        self.called.set()
        return arrays, 10, {}


class Tokens:
    """Credentials that number their tokens; a token is used up by one attempt."""

    def __init__(self) -> None:
        self.number = 0

    def metadata(self, _method: str, _first_message: object) -> Any:
        return (("authorization", f"Bearer {self.number}"),)

    def refused(self, _metadata: object) -> None:
        self.number += 1


def large_model(chunk_count: int = CHUNKS) -> dict[str, Array]:
    return {"w": np.random.default_rng(1).normal(size=chunk_count * 2**18).astype(np.float32)}


def device_on(line: Line, deployment: Any, folder: Path, **settings: Any) -> Client:
    """Enroll a device over a good line, and open it over another."""
    enroll(deployment.bundle(), home=folder)
    return Client(home=folder, address=line.address, **settings)


def ends(
    exception: grpc.StatusCode, reason: str = ""
) -> Callable[[Any, grpc.ServicerContext], None]:
    """Return a method that refuses every call."""
    return lambda _, context: fail(context, exception, ErrorInfo(reason=reason))


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a thread; what it returns or raises is put into the list."""
    results: list[Any] = []

    def target() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001  # looked at by the test
            results.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, results


# --- transfers that go on


def breaking(
    uploads: Uploads, code: grpc.StatusCode, reason: str, every: int
) -> Callable[..., Any]:
    """Return a SubmitUpdate that ends with an error after every so many chunks."""

    def submit(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        received = 0
        for request in requests:
            if request.HasField("header"):  # of a large payload it comes by itself
                uploads.headers.append(request.header)
            if not request.HasField("chunk"):
                continue
            uploads.stored.append(request.chunk.data)
            received += 1
            if received == every and len(uploads.stored) < CHUNKS:
                fail(context, code, ErrorInfo(reason=reason))
        uploads.accepted = True
        return messages.SubmitUpdateResponse(update_id=UPDATE_ID)

    return submit


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "STALLED"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ""),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    ],
)
def test_an_upload_goes_on_as_often_as_it_moves(
    scripted: Scripted, make_calls: MakeCalls, code: grpc.StatusCode, reason: str
) -> None:
    arrays, uploads = arrays_of(CHUNKS), Uploads()
    scripted.answers = {SUBMIT: breaking(uploads, code, reason, 1), "GetUpload": uploads.state}
    payload = Payload(Manifest.from_arrays(arrays), arrays)
    calls = make_calls().authenticated(Tokens())

    Upload(calls, UPDATE_ID, STATEMENT, payload, progress=lambda *_: None).run()

    assert b"".join(uploads.stored) == payload_of(arrays)
    assert len(uploads.headers) == CHUNKS


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "STALLED"),
        (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    ],
)
def test_a_download_goes_on_as_often_as_it_moves(
    scripted: Scripted, make_calls: MakeCalls, code: grpc.StatusCode, reason: str
) -> None:
    arrays = arrays_of(CHUNKS)
    downloads = Downloads(arrays)
    serve = downloads.serve

    def one_chunk(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield next(serve(request, context))
        if request.first_chunk < CHUNKS - 1:
            fail(context, code, ErrorInfo(reason=reason))

    downloads.serve = one_chunk  # type: ignore[method-assign]

    model = download(scripted, make_calls().authenticated(Tokens()), downloads)

    assert_same(model.arrays, arrays)


def test_a_token_that_is_always_refused_ends_a_transfer(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    uploads, tokens = Uploads(), Tokens()
    scripted.answers = {
        SUBMIT: ends(grpc.StatusCode.UNAUTHENTICATED),
        "GetUpload": uploads.state,
    }
    arrays = arrays_of(2)
    payload = Payload(Manifest.from_arrays(arrays), arrays)

    with pytest.raises(Exception, match="UNAUTHENTICATED"):
        Upload(
            make_calls().authenticated(tokens),
            UPDATE_ID,
            STATEMENT,
            payload,
            progress=lambda *_: None,
        ).run()

    assert tokens.number == 1


def test_a_proxy_that_takes_chunks_and_refuses_the_call_is_given_up(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    def submit(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        list(requests)
        fail(context, grpc.StatusCode.UNAVAILABLE)

    uploads = Uploads()
    calls = make_calls(RetryPolicy(total_time_s=0.5, max_delay_s=0.05))
    scripted.answers = {SUBMIT: submit, "GetUpload": uploads.state}
    arrays = arrays_of(3)
    payload = Payload(Manifest.from_arrays(arrays), arrays)

    with pytest.raises(UnavailableError):
        Upload(calls, UPDATE_ID, STATEMENT, payload, progress=lambda *_: None).run()


def hushing(train: Trainer, for_s: float, *at_bytes: int) -> Callable[[Line, int], None]:
    """Return what makes a line fall silent for a while, at each of these places of an upload."""
    places = sorted(at_bytes, reverse=True)

    def hush(line: Line, carried_bytes: int) -> None:
        if train.count and places and carried_bytes > places[-1]:
            places.pop()
            line.hush()
            threading.Timer(for_s, line.speak).start()

    return hush


SILENCES = (2 * CHUNK_BYTES, 4 * CHUNK_BYTES, 8 * CHUNK_BYTES)


def test_an_upload_outlives_its_patience_and_the_deadlines_of_its_attempts(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(upload_batch_bytes=CHUNK_BYTES)
    session_id = deployment.session(large_model(10), rounds=ONE_DEVICE, total_rounds=1)
    train = Trainer()

    with (
        Line(deployment.coordinator.address, when_carried=hushing(train, 1.6, *SILENCES)) as line,
        device_on(
            line,
            deployment,
            tmp_path / "a",
            retry=RetryPolicy(total_time_s=3.5),
            transfer_timeout_s=1.5,
        ) as client,
    ):
        summary = run(client, train, training_session_id=session_id, patience_s=20)

    assert (summary.update_count, train.count) == (1, 1)


def test_an_upload_outlives_any_number_of_access_tokens(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy(access_token_s=2.5, upload_batch_bytes=CHUNK_BYTES)
    session_id = deployment.session(large_model(10), rounds=ONE_DEVICE, total_rounds=1)
    train = Trainer()

    with (
        Line(
            deployment.coordinator.address, when_carried=hushing(train, 2.6, *SILENCES[1:])
        ) as line,
        device_on(line, deployment, tmp_path / "a") as client,
    ):
        summary = run(client, train, training_session_id=session_id, patience_s=20)

    assert (summary.update_count, train.count) == (1, 1)


def test_a_line_that_is_silent_in_the_middle_of_an_upload_is_resumed(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(stall_timeout_s=0.5, upload_batch_bytes=CHUNK_BYTES)
    session_id = deployment.session(large_model(10), rounds=ONE_DEVICE, total_rounds=1)
    train = Trainer()

    with (
        Line(deployment.coordinator.address, when_carried=hushing(train, 1.5, *SILENCES)) as line,
        device_on(line, deployment, tmp_path / "a") as client,
    ):
        summary = run(client, train, training_session_id=session_id, patience_s=20)

    assert (summary.update_count, train.count) == (1, 1)


def test_a_line_that_is_cut_in_the_middle_of_an_upload_is_resumed(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy(upload_batch_bytes=2**20)
    session_id = deployment.session(large_model(), rounds=ONE_DEVICE, total_rounds=1)
    train = Trainer()
    cuts = [part * 2**20 for part in (5, 3, 2)]

    def cut(line: Line, carried_bytes: int) -> None:
        if train.count and cuts and carried_bytes > cuts[-1]:
            cuts.pop()
            line.cut()

    with (
        Line(deployment.coordinator.address, when_carried=cut) as line,
        device_on(line, deployment, tmp_path / "a") as client,
    ):
        summary = run(client, train, training_session_id=session_id, patience_s=20)

    assert not cuts
    assert (summary.update_count, train.count) == (1, 1)


# --- patience is counted once


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_calls_on_the_way_of_a_call_share_its_patience(
    scripted: Scripted, make_calls: MakeCalls, depth: int
) -> None:
    scripted.answers["GetTask"] = ends(grpc.StatusCode.UNAVAILABLE)
    calls = make_calls(RetryPolicy(total_time_s=1.0, max_delay_s=0.1))

    def attempt(level: int) -> Callable[[Attempts], Any]:
        if level == 0:
            return lambda _: calls.transport.unary(
                calls.transport.stub.GetTask, messages.GetTaskRequest()
            )
        return lambda _: calls.repeat(attempt(level - 1))

    started = time.monotonic()
    with pytest.raises(UnavailableError):
        calls.repeat(attempt(depth))

    assert time.monotonic() - started < 1.3


def test_a_login_that_is_not_answered_shares_the_patience_of_its_call(
    deploy: Deploy, relay: Callable[[str], Any], tmp_path: Path
) -> None:
    deployment = deploy()
    between = relay(deployment.coordinator.address)
    enroll(deployment.bundle(), home=tmp_path / "a")

    def lose(_: object) -> None:
        raise UnavailableError("lost")

    between.on_answer["BeginAuthentication"] = lose
    with Client(
        home=tmp_path / "a",
        address=between.address,
        retry=RetryPolicy(total_time_s=1.0, max_delay_s=0.1),
    ) as client:
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            client.heartbeat()

    assert time.monotonic() - started < 1.5


def test_the_loop_gives_up_when_its_patience_ends(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy()
    enroll(deployment.bundle(), home=tmp_path / "a")

    with Client(home=tmp_path / "a", address="127.0.0.1:1") as client:
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            run(client, Trainer(), patience_s=1.0)

    assert time.monotonic() - started < 2.0


# --- loops that are told to end


@pytest.fixture
def idle(deploy: Deploy, relay: Callable[[str], Any], tmp_path: Path) -> Iterator[Any]:
    """Yield a device behind a relay, and the relay."""
    deployment = deploy()
    between = relay(deployment.coordinator.address)
    enroll(deployment.bundle(), home=tmp_path / "a")
    with Client(home=tmp_path / "a", address=between.address) as client:
        yield client, between


def waiting_ten_years(answered: threading.Event) -> Callable[[Any], Any]:
    def wait(answer: messages.GetTaskResponse) -> messages.GetTaskResponse:
        answered.set()
        answer.Clear()
        answer.kind = messages.TASK_KIND_WAIT
        answer.poll_delay.seconds = 10 * 365 * 86_400
        return answer

    return wait


def refusing(asked: threading.Event) -> Callable[[Any], Any]:
    def refuse(_: object) -> None:
        asked.set()
        raise UnavailableError("away")

    return refuse


def hanging(asked: threading.Event, until: threading.Event) -> Callable[[Any], Any]:
    def hang(answer: object) -> object:
        asked.set()
        until.wait(20)
        return answer

    return hang


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("state", ["paused", "outage", "in flight"])
def test_a_loop_ends_at_once(
    idle: tuple[Client, Any], monkeypatch: pytest.MonkeyPatch, how: str, state: str
) -> None:
    monkeypatch.setattr(lifetime, "STOP_GRACE_S", 0.3)
    client, between = idle
    asked, released, stop = threading.Event(), threading.Event(), threading.Event()
    between.on_answer["GetTask"] = {
        "paused": waiting_ten_years(asked),
        "outage": refusing(asked),
        "in flight": hanging(asked, released),
    }[state]
    thread, results = in_thread(lambda: run(client, Trainer(), stop=stop))
    assert asked.wait(10)

    started = time.monotonic()
    (stop.set if how == "stop" else client.close)()
    thread.join(10)
    took_s = time.monotonic() - started
    released.set()

    assert took_s < 1.5
    assert results == [RunSummary()]


def test_a_download_in_flight_ends_with_its_loop(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "STOP_GRACE_S", 0.3)
    deployment = deploy()
    session_id = deployment.session(large_model(), rounds=ONE_DEVICE)
    stop, train = threading.Event(), Trainer()

    def progress(*_: object) -> None:
        line.hush()
        stop.set()

    with (
        Line(deployment.coordinator.address) as line,
        device_on(line, deployment, tmp_path / "a", progress=progress) as client,
    ):
        thread, results = in_thread(
            lambda: run(client, train, stop=stop, training_session_id=session_id)
        )
        thread.join(10)

    assert not thread.is_alive()
    assert train.count == 0
    assert isinstance(results[0], RunSummary)


def test_a_loop_that_is_stopped_while_it_trains_still_sends(deploy: Deploy) -> None:
    deployment = deploy()
    client = deployment.device("a")
    session_id = deployment.session(rounds=ONE_DEVICE, total_rounds=5)
    stop = threading.Event()

    def train(arrays: dict[str, Array], _: TrainingTask) -> Any:
        stop.set()
        return arrays, 1, {}

    summary = run(client, train, stop=stop, training_session_id=session_id)

    assert summary.update_count == 1


def test_a_stopped_loop_leaves_its_client_open(deploy: Deploy) -> None:
    client = deploy().device("a")
    stop = threading.Event()
    stop.set()

    run(client, Trainer(), stop=stop)

    assert client.heartbeat().device_state == "active"


def wait_until_in_use(home: Path) -> None:
    """Wait until another process has opened a key store."""
    for _ in range(1000):
        try:
            KeyStore(home).close()
        except KeyStoreLockedError:
            return
        threading.Event().wait(0.02)
    raise AssertionError("nobody opened the key store")


def test_a_device_program_ends_on_sigterm_in_an_outage(deploy: Deploy, tmp_path: Path) -> None:
    enroll(deploy().bundle(), home=tmp_path / "a")
    command = [sys.executable, "-m", "qflare_client", "run", "math:sqrt"]
    with subprocess.Popen(
        [*command, "--home", str(tmp_path / "a"), "--address", "127.0.0.1:1"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until_in_use(tmp_path / "a")
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=10)

    assert time.monotonic() - started < 3
    assert process.returncode == 0
    assert shown.startswith("0 updates accepted")


# --- what is no outage


def test_a_proxy_that_refuses_the_size_is_no_outage() -> None:
    with refusing_proxy(413) as address:
        calls = Calls(Transport(address), RetryPolicy())
        started = time.monotonic()
        with pytest.raises(ProxyRefusedError, match="limit on request bodies") as caught:
            calls.unary(calls.transport.stub.GetTask, messages.GetTaskRequest())
        calls.close()

    assert caught.value.reason == "HTTP_413"
    assert time.monotonic() - started < 5


def test_the_proxy_of_the_environment_takes_no_call_within_the_machine(
    scripted: Scripted, make_calls: MakeCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    scripted.answers["GetTask"] = lambda *_: messages.GetTaskResponse()
    calls = make_calls(RetryPolicy(total_time_s=0))

    calls.unary(calls.transport.stub.GetTask, messages.GetTaskRequest())


def test_wrong_certificates_are_no_outage(scripted: Scripted) -> None:
    calls = Calls(Transport(scripted.address, tls=Tls()), RetryPolicy())
    started = time.monotonic()

    with pytest.raises(TlsError, match="does not speak TLS"):
        calls.unary(calls.transport.stub.GetTask, messages.GetTaskRequest())

    calls.close()
    assert time.monotonic() - started < 5
