"""A helper that lies to coordinators: a proxy that alters the answers of a real one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
from google.protobuf import json_format

from qflare.v1 import helper_service_pb2 as messages
from tests.support.helpers import HelperProcess

Answers = list[messages.UnmaskResponse]
Lie = Callable[[Answers], Iterable[messages.UnmaskResponse | bytes]]
"""Returns the parts of another answer; bytes are sent as they are."""

UNMASK: Final = "/qflare.v1.HelperService/Unmask"


class LyingHelper(grpc.GenericRpcHandler):
    """Takes a real helper's place in the folder of a coordinator.

    Args:
        helper: The real one, running.

    Attributes:
        lie: Alters the parts of an answer; by default they stay.
        answers: Parts of the last answer of the real helper.
    """

    def __init__(self, helper: HelperProcess) -> None:
        self.lie: Lie = lambda answers: answers
        self.answers: Answers = []
        self._helper = helper
        self._channel = grpc.insecure_channel(helper.address)
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        bundle = messages.HelperBundle()
        json_format.Parse(helper.bundle_file.read_text(), bundle)
        bundle.address = f"127.0.0.1:{port}"
        helper.bundle_file.write_text(json_format.MessageToJson(bundle))

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of `Unmask`."""
        if handler_call_details.method != UNMASK:
            return None
        return grpc.stream_stream_rpc_method_handler(self._unmask, response_serializer=_serialized)

    def _unmask(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        call: Any = self._channel.stream_stream(UNMASK)
        try:
            answers = [messages.UnmaskResponse.FromString(data) for data in call(parts, timeout=20)]
        except grpc.RpcError as error:
            failed: Any = error
            context.abort(failed.code(), failed.details())
        self.answers = answers
        yield from self.lie(answers)


def _serialized(part: messages.UnmaskResponse | bytes) -> bytes:
    return part if isinstance(part, bytes) else bytes(part.SerializeToString())
