"""gRPC service of a helper: admits calls, and turns refusals into statuses.

Errors other than refusals are logged with a traceback and sent as INTERNAL without details.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import helper_service_pb2_grpc
from qflare_helper import errors
from qflare_helper.exchange import header_of, respond
from qflare_helper.identity import HelperIdentity
from qflare_helper.ledger import Ledger
from qflare_helper.limits import StallGuard, Strangers
from qflare_helper.monitoring import HelperMetrics
from qflare_helper.unmasking import Unmasking

logger = logging.getLogger(__name__)

DOMAIN: Final = "qflare"
DETAILS_KEY: Final = "grpc-status-details-bin"
MAX_CALL_S: Final = 600.0
"""Longest duration of one call in seconds."""

CODES: Final[dict[type[errors.HelperError], grpc.StatusCode]] = {
    errors.NoiseUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UntrustedKeysetError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PolicyError: grpc.StatusCode.PERMISSION_DENIED,
    errors.SmallCohortError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverlapError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RolledBackError: grpc.StatusCode.DATA_LOSS,
    errors.BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StoreError: grpc.StatusCode.UNAVAILABLE,
}


class HelperServicer(helper_service_pb2_grpc.HelperServiceServicer):
    """Serves one helper.

    Args:
        identity: Keys of the helper.
        ledger: Its ledger.
        unmasking: Answers requests.
        metrics: Counts them.
        guard: Ends calls that stall.
        max_calls: Most verified requests in progress.
    """

    def __init__(
        self,
        identity: HelperIdentity,
        ledger: Ledger,
        unmasking: Unmasking,
        metrics: HelperMetrics,
        guard: StallGuard,
        max_calls: int,
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._unmasking = unmasking
        self._metrics = metrics
        self._guard = guard
        self._strangers = Strangers()
        self._places = threading.BoundedSemaphore(max_calls)

    def GetHelper(  # noqa: N802 - the name of the method
        self, request: messages.GetHelperRequest, context: grpc.ServicerContext
    ) -> messages.GetHelperResponse:
        """Return the document and the counter."""
        del request
        try:
            return messages.GetHelperResponse(
                document=self._identity.bundle.document, counter=self._ledger.counter()
            )
        except errors.HelperError as error:
            _abort(context, error)

    def Unmask(  # noqa: N802
        self, request_iterator: Iterator[messages.UnmaskRequest], context: grpc.ServicerContext
    ) -> Iterator[messages.UnmaskResponse]:
        """Answer a request."""
        timer = threading.Timer(MAX_CALL_S, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield from self._answered(request_iterator, context)
        finally:
            timer.cancel()

    def _answered(
        self, parts: Iterator[messages.UnmaskRequest], context: grpc.ServicerContext
    ) -> Iterator[messages.UnmaskResponse]:
        try:
            leave = self._strangers.enter(context.peer())
        except errors.BusyError as error:
            self._metrics.ended(error.reason)
            _abort(context, error)
        try:
            with self._guard.watch(parts, context.cancel) as paced:
                yield from self._unmask(paced, leave)
        except errors.HelperError as error:
            self._metrics.ended(error.reason)
            logger.warning("refused: %s: %s", error.reason, error)
            _abort(context, error)
        except grpc.RpcError:
            raise
        except Exception as error:
            if not context.is_active():
                raise
            logger.exception("request failed")
            context.abort(grpc.StatusCode.INTERNAL, "internal error")
            raise AssertionError from error
        finally:
            leave()

    def _unmask(
        self, parts: Iterator[messages.UnmaskRequest], leave: Callable[[], None]
    ) -> Iterator[messages.UnmaskResponse]:
        """Answer a request; `leave` is called when it is known to be a coordinator's."""
        call = self._unmasking.open(header_of(parts))
        if not self._places.acquire(blocking=False):
            raise errors.BusyError("too many requests are in progress")
        leave()
        started = time.monotonic()
        self._metrics.in_progress.inc()
        try:
            outcome = yield from respond(self._unmasking, call, parts)
        finally:
            self._metrics.in_progress.dec()
            self._places.release()
        self._metrics.ended(outcome, time.monotonic() - started)


def handlers(servicer: HelperServicer) -> grpc.GenericRpcHandler:
    """Return the handlers of the methods.

    gRPC answers INTERNAL to bytes that are no message. Here they are read as a message without content, which the
    methods refuse like any other part that is out of place.
    """
    return grpc.method_handlers_generic_handler(
        messages.DESCRIPTOR.services_by_name["HelperService"].full_name,
        {
            "GetHelper": grpc.unary_unary_rpc_method_handler(
                servicer.GetHelper,
                request_deserializer=_reader(messages.GetHelperRequest),
                response_serializer=messages.GetHelperResponse.SerializeToString,
            ),
            "Unmask": grpc.stream_stream_rpc_method_handler(
                servicer.Unmask,
                request_deserializer=_reader(messages.UnmaskRequest),
                response_serializer=messages.UnmaskResponse.SerializeToString,
            ),
        },
    )


def _reader(kind: type[Message]) -> Callable[[bytes], Message]:
    def read(data: bytes) -> Message:
        try:
            return kind.FromString(data)
        except DecodeError:
            return kind()

    return read


def _abort(context: grpc.ServicerContext, error: errors.HelperError) -> NoReturn:
    """End a call with the status of a refusal and its reason."""
    code = CODES[type(error)]
    text = (
        "the helper's database cannot be used"
        if code is grpc.StatusCode.UNAVAILABLE
        else str(error)
    )
    detail: Any = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=text, details=[detail])
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code, text)
    raise AssertionError
