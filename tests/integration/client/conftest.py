"""Coordinators for the device SDK: real ones, on SQLite, and one of protocol.

A coordinator of protocol is a real gRPC server that answers as a test tells it to. It stands in for what no
real coordinator does on demand: break a stream at a given message, answer with a given error, send bytes that
are wrong.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo

from qflare.v1 import coordinator_service_pb2, coordinator_service_pb2_grpc
from qflare_client.errors import UnavailableError
from qflare_client.rpc.caller import Calls
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.transport import Transport


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return the database of a real coordinator: what a device sees does not depend on its kind."""
    return sqlite_url


class Scripted:
    """A coordinator whose methods a test sets: ``scripted.answers["GetTask"] = ...``."""

    def __init__(self) -> None:
        self.address = ""
        self.answers: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = {}


def fail(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    *details: Message,
    message: str = "scripted",
) -> NoReturn:
    """End a call with an error and its details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A running coordinator of protocol."""
    servicer = Scripted()
    server = grpc.server(ThreadPoolExecutor(8))
    coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server(
        _Forwarding(servicer),  # type: ignore[abstract]  # it finds all methods
        server,
    )
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None).wait()


class _Forwarding(coordinator_service_pb2_grpc.CoordinatorServiceServicer):
    """Looks a method up when it is called, since gRPC keeps the one it was registered with."""

    def __init__(self, scripted: Scripted) -> None:
        self._scripted = scripted

    def __getattribute__(self, name: str) -> Any:
        if not name[0].isupper():
            return super().__getattribute__(name)
        scripted = self._scripted

        def forward(request: Any, context: grpc.ServicerContext) -> Any:
            return scripted.answers[name](request, context)

        return forward


@pytest.fixture
def make_calls(scripted: Scripted) -> Iterator[Callable[..., Calls]]:
    """Make anonymous calls to the coordinator of protocol."""
    made: list[Calls] = []

    def make(policy: RetryPolicy | None = None, **options: Any) -> Calls:
        policy = policy or RetryPolicy(total_time_s=20, initial_delay_s=0.01, max_delay_s=0.05)
        made.append(Calls(Transport(scripted.address, **options), policy))
        return made[-1]

    yield make
    for calls in made:
        calls.close()


class RefusalError(Exception):
    """What a relay answers instead of its coordinator."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Relay:
    """Stands between devices and a real coordinator, sees everything, and changes what a test says.

    Attributes:
        address: Where it listens.
        on_request: By method: what becomes of a request.
        on_answer: By method: what becomes of an answer, or of each message of one. A function that raises
            `UnavailableError` loses it, one that raises `RefusalError` answers with that.
        requests: Unary requests that passed, by method.
    """

    def __init__(self, scripted: Scripted, coordinator_address: str) -> None:
        self.address = scripted.address
        self.on_request: dict[str, Callable[[Any], Any]] = {}
        self.on_answer: dict[str, Callable[[Any], Any]] = {}
        self.requests: dict[str, list[Any]] = {}
        self._channel = grpc.insecure_channel(coordinator_address)
        self._stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(self._channel)
        service = coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]
        for method in service.methods:
            scripted.answers[method.name] = partial(self._relay, method.name)

    def close(self) -> None:
        self._channel.close()

    def _relay(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            answer = self._forward(name, request, context)
            change = self.on_answer.get(name, lambda message: message)
            if isinstance(answer, Message):
                return change(answer)
            return map(change, list(answer))
        except grpc.RpcError as error:
            context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))  # type: ignore[arg-type]
            context.abort(error.code(), error.details() or "")
        except UnavailableError as error:
            fail(context, grpc.StatusCode.UNAVAILABLE, message=str(error))
        except RefusalError as refusal:
            fail(context, refusal.code, ErrorInfo(reason=str(refusal)))

    def _forward(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = [pair for pair in context.invocation_metadata() if pair[0] in _CREDENTIALS]
        change = self.on_request.get(name, lambda message: message)
        if not isinstance(request, Message):
            request = iter([change(message) for message in request])
        else:
            self.requests.setdefault(name, []).append(request)
            request = change(request)
        return getattr(self._stub, name)(request, metadata=metadata, timeout=20)


_CREDENTIALS = ("authorization", "qf-pop-bin")


@pytest.fixture
def relay(scripted: Scripted) -> Iterator[Callable[[str], Relay]]:
    """Return a function that puts a relay in front of a coordinator's address."""
    made: list[Relay] = []

    def put(address: str) -> Relay:
        made.append(Relay(scripted, address))
        return made[-1]

    yield put
    for entry in made:
        entry.close()
