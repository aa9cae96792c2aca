from collections.abc import Callable
from threading import Event, Thread

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RequestInfo, RetryInfo

from qflare.addresses import is_loopback
from qflare.v1 import coordinator_service_pb2 as messages
from qflare_client import errors
from qflare_client.rpc.caller import Calls, method_of
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.transport import Metadata, Transport
from tests.integration.client.conftest import Scripted, fail

MakeCalls = Callable[..., Calls]
ANSWER = messages.GetTaskResponse(kind=messages.TASK_KIND_WAIT)


class Failing:
    """Fails the first calls, then answers."""

    def __init__(self, count: int, code: grpc.StatusCode, *details: Message) -> None:
        self.left = count
        self.calls = 0
        self.code = code
        self.details = details

    def __call__(self, _: object, context: grpc.ServicerContext) -> messages.GetTaskResponse:
        self.calls += 1
        if self.left > 0:
            self.left -= 1
            fail(context, self.code, *self.details)
        return ANSWER


def get_task(calls: Calls) -> messages.GetTaskResponse:
    return calls.unary(calls.transport.stub.GetTask, messages.GetTaskRequest())


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED])
def test_a_call_is_repeated(
    scripted: Scripted, make_calls: MakeCalls, code: grpc.StatusCode
) -> None:
    failing = Failing(3, code)
    scripted.answers["GetTask"] = failing

    assert get_task(make_calls()) == ANSWER
    assert failing.calls == 4


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    ],
)
def test_a_call_is_not_repeated(
    scripted: Scripted, make_calls: MakeCalls, code: grpc.StatusCode
) -> None:
    failing = Failing(1, code)
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.QflareClientError):
        get_task(make_calls())

    assert failing.calls == 1


def test_a_full_coordinator_is_asked_again_when_it_says_so(
    scripted: Scripted, make_calls: MakeCalls
) -> None:
    retry = RetryInfo(retry_delay=Duration(nanos=10_000_000))
    failing = Failing(2, grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorInfo(), retry)
    scripted.answers["GetTask"] = failing

    assert get_task(make_calls()) == ANSWER


def test_the_reason_and_its_metadata_arrive(scripted: Scripted, make_calls: MakeCalls) -> None:
    info = ErrorInfo(reason="STALE_BASE_VERSION", metadata={"current_version": "12"})
    failing = Failing(1, grpc.StatusCode.FAILED_PRECONDITION, RetryInfo(), info)
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.StaleBaseVersionError) as caught:
        get_task(make_calls())

    assert caught.value.reason == "STALE_BASE_VERSION"
    assert caught.value.current_version == 12


def test_a_fault_names_its_request(scripted: Scripted, make_calls: MakeCalls) -> None:
    failing = Failing(1, grpc.StatusCode.INTERNAL, RequestInfo(request_id="r77"))
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.CoordinatorFaultError, match="r77"):
        get_task(make_calls())


def test_no_grpc_type_is_in_an_error(scripted: Scripted, make_calls: MakeCalls) -> None:
    failing = Failing(1, grpc.StatusCode.NOT_FOUND)
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.NotFoundError) as caught:
        get_task(make_calls())

    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_patience_ends(scripted: Scripted, make_calls: MakeCalls) -> None:
    failing = Failing(1_000, grpc.StatusCode.UNAVAILABLE)
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.UnavailableError):
        get_task(make_calls(RetryPolicy(total_time_s=0.2, max_delay_s=0.02)))


def test_nobody_there_is_unavailable() -> None:
    calls = Calls(Transport("127.0.0.1:1"), RetryPolicy(total_time_s=0))

    with pytest.raises(errors.UnavailableError):
        get_task(calls)

    calls.close()


def test_a_slow_answer_is_not_waited_for(scripted: Scripted, make_calls: MakeCalls) -> None:
    answer = Event()

    def wait(_: object, __: object) -> messages.GetTaskResponse:
        answer.wait(10)
        return ANSWER

    scripted.answers["GetTask"] = wait

    with pytest.raises(errors.DeadlineExceededError):
        get_task(make_calls(timeout_s=0.1))

    answer.set()


def test_a_closed_client_says_so(make_calls: MakeCalls) -> None:
    calls = make_calls()
    calls.close()

    with pytest.raises(errors.UnavailableError, match="closed"):
        get_task(calls)


def test_closing_ends_the_wait_between_attempts(scripted: Scripted, make_calls: MakeCalls) -> None:
    called = Event()

    def refuse(_: object, context: grpc.ServicerContext) -> None:
        called.set()
        fail(context, grpc.StatusCode.UNAVAILABLE)

    scripted.answers["GetTask"] = refuse
    calls = make_calls(RetryPolicy(total_time_s=600, initial_delay_s=500, max_delay_s=500))
    raised: list[BaseException] = []

    def call() -> None:
        try:
            get_task(calls)
        except errors.UnavailableError as error:
            raised.append(error)

    thread = Thread(target=call)
    thread.start()
    called.wait(10)
    calls.close()
    thread.join(10)

    assert len(raised) == 1


class Counting:
    """Credentials that number their tokens."""

    def __init__(self) -> None:
        self.token = 0
        self.refusals: list[Metadata] = []

    def metadata(self, method: str, first_message: Message) -> Metadata:
        assert method == method_of(first_message)
        return (("authorization", f"Bearer {self.token}"),)

    def refused(self, metadata: Metadata) -> None:
        self.refusals.append(metadata)
        self.token += 1


def bearer_of(context: grpc.ServicerContext) -> str:
    return str(dict(context.invocation_metadata())["authorization"])


def test_a_refused_token_is_replaced_once(scripted: Scripted, make_calls: MakeCalls) -> None:
    def answer(_: object, context: grpc.ServicerContext) -> messages.GetTaskResponse:
        if bearer_of(context) == "Bearer 0":
            fail(context, grpc.StatusCode.UNAUTHENTICATED)
        return ANSWER

    scripted.answers["GetTask"] = answer
    credentials = Counting()

    assert get_task(make_calls().authenticated(credentials)) == ANSWER
    assert credentials.refusals == [(("authorization", "Bearer 0"),)]


def test_a_second_refusal_is_raised(scripted: Scripted, make_calls: MakeCalls) -> None:
    failing = Failing(9, grpc.StatusCode.UNAUTHENTICATED)
    scripted.answers["GetTask"] = failing

    with pytest.raises(errors.AuthenticationError):
        get_task(make_calls().authenticated(Counting()))

    assert failing.calls == 2


def test_a_method_is_named_by_its_request() -> None:
    assert method_of(messages.GetTaskRequest()) == "/qflare.v1.CoordinatorService/GetTask"


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("ipv6:[::1]:1,[::1]:2", True),
        ("10.0.0.1:1", False),
        ("example.org:443", False),
        ("localhost.example.org:443", False),
        ("dns:///localhost:1", False),
        ("127.example.test:1", False),
        ("ipv4:127.example.test:1", False),
        ("::1:5005", False),
        ("[::1].example.org:443", False),
    ],
)
def test_plaintext_stays_on_this_machine(address: str, wanted: bool) -> None:
    assert is_loopback(address) is wanted
