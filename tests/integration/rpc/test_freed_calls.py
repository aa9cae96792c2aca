"""Calls are freed when they end, without a garbage collection: gRPC refuses streams while many ended ones are kept."""

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

import grpc
import numpy as np
import pytest

from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.hostile_requests import RequestMaker, caller_of, is_watch, methods
from tests.support.raw_device import RawDevice

Deploy = Callable[..., Deployment]
MESSAGES: Final = 4
"""Messages to each method: of a kind that is refused, and of one that is not."""
TIMEOUT_S: Final = 20.0
WATCH_S: Final = 0.3
WEIGHTS: Final = {"w": np.zeros(4, np.float32)}


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Collect no garbage during a test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy(max_calls_per_second=1_000_000)


def kept_calls(earlier: set[int]) -> Counter[str]:
    """Return the methods of the calls that are kept in memory, but for earlier ones."""
    return Counter(
        found.route.method
        for found in gc.get_objects()
        if isinstance(found, IncomingCall) and id(found) not in earlier
    )


def await_none(earlier: set[int]) -> Counter[str]:
    """Wait until no call is kept; return those that are kept all the same."""
    deadline = time.monotonic() + TIMEOUT_S
    while (kept := kept_calls(earlier)) and time.monotonic() < deadline:
        threading.Event().wait(0.2)
    return kept


@pytest.mark.usefixtures("no_collections")
def test_calls_of_every_method_are_freed_when_they_end(deployment: Deployment) -> None:
    raw = RawDevice(deployment.device("raw"), deployment.devices_stub)
    session_id = deployment.session(WEIGHTS)
    chance = Random(3)
    maker = RequestMaker(chance, {"training_session_id": [session_id, "unknown"]})
    token = deployment.issue_admin(Role.ADMIN, Role.AUDITOR)
    credentials = {
        "AdminService": (("authorization", f"Bearer {token}"),),
        "CoordinatorService": raw.metadata,
    }
    earlier = {id(found) for found in gc.get_objects() if isinstance(found, IncomingCall)}

    codes: Counter[Any] = Counter()
    for path, method in methods():
        for number in range(MESSAGES):
            message = maker.message(method.input_type)
            data = message.SerializeToString() if number % 2 else maker.spoil_bytes(b"\x08\x01")
            metadata = credentials.get(method.containing_service.name, ())
            codes[outcome(deployment.channel, path, method, data, metadata)] += 1

    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 50
    assert await_none(earlier) == Counter()


def outcome(
    channel: grpc.Channel, path: str, method: Any, data: bytes, metadata: Any
) -> grpc.StatusCode:
    """Send a message and return how its call ended."""
    send = caller_of(channel, path, method)
    request = iter([data]) if method.client_streaming else data
    timeout_s = WATCH_S if is_watch(path) else TIMEOUT_S
    try:
        answer = send(request, metadata=metadata, timeout=timeout_s)
        if method.server_streaming:
            for _ in answer:
                pass
    except grpc.RpcError as error:
        refused: Any = error
        code: grpc.StatusCode = refused.code()
        return code
    return grpc.StatusCode.OK
