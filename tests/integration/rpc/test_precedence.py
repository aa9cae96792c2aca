"""Short calls of devices have precedence: an upload pauses between its chunks while one is handled, within bounds."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import CHUNK_BYTES
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_server.payloads.receiver import Receiver
from qflare_server.serving.rpc import dispatcher
from qflare_server.serving.rpc.call import RunningCalls
from tests.integration.conftest import Deployment
from tests.support.raw_device import RawDevice

Deploy = Callable[..., Deployment]
LARGE = {"w": np.ones(6 * CHUNK_BYTES // 4, np.float32)}
ROUNDS = training_pb2.RoundPolicy(quorum=99, target=99, deadline=Duration(seconds=300))
TIMEOUT_S = 60.0


class HeldCall:
    """A device's short call, held in the thread that handles it until it is let go."""

    def __init__(self, deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
        self._device = RawDevice(deployment.device("short"), deployment.devices_stub)
        self._device.task()  # its token is known now
        self._entered, self._let_go = threading.Event(), threading.Event()
        uploads = deployment.coordinator.use_cases.uploads
        monkeypatch.setattr(uploads, "find", self._held)
        self._call: Any = None

    def _held(self, *_arguments: Any) -> tuple[int, None]:
        self._entered.set()
        assert self._let_go.wait(TIMEOUT_S)
        return 0, None

    def begin(self) -> None:
        """Make the call, and wait until its thread holds it."""
        request = pb.GetUploadRequest(update_id="0" * 36)
        self._call = self._device.stub.GetUpload.future(
            request, metadata=self._device.metadata, timeout=TIMEOUT_S
        )
        assert self._entered.wait(TIMEOUT_S)

    def end(self) -> None:
        """Let it go, and wait for its answer."""
        self._let_go.set()
        self._call.result()


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy()


@pytest.fixture
def held(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCall]:
    call = HeldCall(deployment, monkeypatch)
    call.begin()
    yield call
    call.end()


@pytest.fixture
def upload(deployment: Deployment) -> Callable[[], Any]:
    """Return what begins an upload of six chunks, as a future."""
    session_id = deployment.session(LARGE, rounds=ROUNDS)
    device = RawDevice(deployment.device("large"), deployment.devices_stub)
    draft = device.draft(device.task(session_id), LARGE)

    def begin() -> Any:
        return device.stub.SubmitUpdate.future(
            device.messages(draft), metadata=device.metadata, timeout=TIMEOUT_S
        )

    return begin


def test_an_upload_pauses_while_a_short_call_is_handled(
    upload: Callable[[], Any], held: HeldCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "LONGEST_PAUSE_S", TIMEOUT_S)
    wait, paused = RunningCalls.wait_until_none, threading.Event()
    add, chunks = Receiver.add, list[int]()

    def noted(calls: RunningCalls, timeout_s: float) -> bool:
        paused.set()
        return wait(calls, timeout_s)

    def counted(receiver: Receiver, index: int, chunk: bytes) -> None:
        chunks.append(index)
        add(receiver, index, chunk)

    monkeypatch.setattr(RunningCalls, "wait_until_none", noted)
    monkeypatch.setattr(Receiver, "add", counted)
    uploading = upload()
    assert paused.wait(TIMEOUT_S)
    assert not chunks

    held.end()
    assert uploading.result().acceptance_sequence == 1
    assert chunks == list(range(6))


@pytest.mark.usefixtures("held")
def test_an_upload_ends_beside_a_short_call_that_does_not(
    upload: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "LONGEST_PAUSE_S", 0.001)
    assert upload().result().acceptance_sequence == 1
