"""Calls of a class for which the machine starts no thread are refused, and answered once it starts one."""

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from qflare_server.errors import TooManyRequestsError
from tests.support.raw_device import RawDevice, reason_of

Deploy = Callable[..., Any]


@pytest.fixture
def raw(deploy: Deploy) -> RawDevice:
    """Return a device at a coordinator that has not yet answered a device's call."""
    deployment = deploy()
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


def test_a_call_for_which_no_thread_can_be_started_is_refused_at_once(
    raw: RawDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("device-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", refuse)
        with pytest.raises(grpc.RpcError) as refused:
            raw.task()
        assert reason_of(refused.value) == TooManyRequestsError.reason

    raw.task()
