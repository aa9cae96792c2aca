"""A coordinator of a later release: a proxy that changes answers of a real one, and signs what is signed anew."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import coordinator_service_pb2, security_pb2

SERVICE: Final = coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]
UNKNOWN: Final = 99
SIGNED: Final[Mapping[str, tuple[type[Message], SigningContext]]] = {
    "GetKeyset.bundle.roots": (security_pb2.RootDocument, SigningContext.ROOT),
    "GetKeyset.bundle.keyset": (security_pb2.Keyset, SigningContext.KEYSET),
    "Register.receipt": (security_pb2.EnrollmentReceipt, SigningContext.RECEIPT),
    "GetTask.task": (security_pb2.TaskStatement, SigningContext.TASK),
    "GetTask.neighbors.members.advertisement": (
        security_pb2.NeighborAdvertisement,
        SigningContext.NEIGHBOR_ADVERTISEMENT,
    ),
    "GetTask.neighbors.members.device_keys.receipt": (
        security_pb2.EnrollmentReceipt,
        SigningContext.RECEIPT,
    ),
    "GetTask.neighbors.members.device_keys.rotation": (
        security_pb2.KeyRotation,
        SigningContext.ROTATION,
    ),
    "GetGlobalModel.header.statement": (security_pb2.ModelStatement, SigningContext.MODEL),
    "GetGlobalModel.header.links": (security_pb2.ModelStatement, SigningContext.MODEL),
    "GetLineage.statements": (security_pb2.ModelStatement, SigningContext.MODEL),
    "GetContributionProof.statement": (security_pb2.ModelStatement, SigningContext.MODEL),
    "GetAuditHead.head": (security_pb2.TreeHead, SigningContext.TREE_HEAD),
}
"""What the envelopes in answers hold, by the path of the field."""
STATED_TWICE: Final = ("GetTask.transfer.", "GetTask.task.!.transfer.")
"""An answer repeats these fields of its signed statement."""


def enum_paths() -> Iterator[str]:
    """Yield the path of every enum field that an answer can hold, `!` before what is inside of an envelope."""
    for method in SERVICE.methods:
        yield from _enums_in(method.output_type, method.name)


def _enums_in(kind: Any, path: str) -> Iterator[str]:
    for field in kind.fields:
        inner = f"{path}.{field.name}"
        if field.enum_type is not None:
            yield inner
        elif field.message_type is not None and field.message_type.file.package == "qflare.v1":
            yield from _enums_in(field.message_type, inner)
            if inner in SIGNED:
                yield from _enums_in(SIGNED[inner][0].DESCRIPTOR, f"{inner}.!")


ADDED: Final = (
    "GetTask.task.masking",
    "GetTask.task.analytics",
    "GetTask.neighbors.earlier_keysets",
)
"""What most tasks lack, and a later release may state."""


class NewerCoordinator(grpc.GenericRpcHandler):
    """Forwards every call; sets one enum field of the answers, named by `path`, to an unknown number.

    Args:
        address: The real coordinator.
        keys: All of its keys that sign, and those of devices whose statements it shows to others.
    """

    def __init__(self, address: str, keys: Sequence[SigningKey]) -> None:
        self.pretend("")
        self._keys = {key.public.key_id: key for key in keys}
        self._channel = grpc.insecure_channel(address)
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(None).wait()
        self._channel.close()

    def pretend(self, path: str) -> None:
        """Change another field from now on, wherever it is stated; nothing for an empty path."""
        self.path, self.change_count = path, 0
        name = path.rpartition(".")[2]
        is_repeated = path.startswith(STATED_TWICE)
        self._paths = [place + name for place in STATED_TWICE] if is_repeated else [path]

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method."""
        name = handler_call_details.method
        method = SERVICE.methods_by_name[name.rpartition("/")[2]]
        metadata = [
            (key, value)
            for key, value in handler_call_details.invocation_metadata
            if key in {"authorization", "qf-pop-bin"}
        ]
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: self._stream(name, method, metadata, request, context)
            )
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(
                lambda requests, context: self._answered(
                    method, self._channel.stream_unary(name), requests, metadata, context
                )
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answered(
                method, self._channel.unary_unary(name), request, metadata, context
            )
        )

    def _answered(
        self,
        method: Any,
        call: Callable[..., bytes],
        request: Any,
        metadata: Any,
        context: grpc.ServicerContext,
    ) -> bytes:
        try:
            return self._changed(method, call(request, metadata=metadata, timeout=60))
        except grpc.RpcError as error:
            _refuse(error, context)

    def _stream(
        self,
        name: str,
        method: Any,
        metadata: Any,
        request: bytes,
        context: grpc.ServicerContext,
    ) -> Iterator[bytes]:
        try:
            call: Any = self._channel.unary_stream(name)
            for answer in call(request, metadata=metadata, timeout=60):
                yield self._changed(method, answer)
        except grpc.RpcError as error:
            _refuse(error, context)

    def _changed(self, method: Any, data: bytes) -> bytes:
        answer = GetMessageClass(method.output_type).FromString(data)
        for path in self._paths:
            prefix, _, rest = path.partition(".")
            if prefix == method.name:
                self._change(answer, prefix, rest.split("."))
        return answer.SerializeToString()

    def _change(self, message: Message, path: str, names: list[str]) -> None:
        """Set the field at the end of the names in every message that has it."""
        if names[0] == "!":
            self._sign_again(message, path, names[1:])
            return
        field: Any = message.DESCRIPTOR.fields_by_name[names[0]]
        if len(names) == 1:
            setattr(message, field.name, UNKNOWN)
            self.change_count += 1
            return
        found = getattr(message, field.name)
        is_list = not hasattr(found, "DESCRIPTOR")
        place = f"{path}.{field.name}"
        if is_list and not found and place.startswith(ADDED):
            found.add()
        if is_list or message.HasField(field.name) or place.startswith(ADDED):
            for one in list(found) if is_list else [found]:
                self._change(one, place, names[1:])

    def _sign_again(self, envelope: Any, path: str, names: list[str]) -> None:
        kind, context = SIGNED[path]
        statement = kind.FromString(envelope.payload)
        self._change(statement, path, names)
        signers = [signature.key_id for signature in envelope.signatures]
        del envelope.signatures[:]
        envelope.payload = statement.SerializeToString(deterministic=True)
        for key_id in signers:
            signed = sign_envelope(self._keys[key_id], context, envelope.payload)
            envelope.signatures.extend(signed.signatures)


def _refuse(error: Any, context: grpc.ServicerContext) -> NoReturn:
    """Answer with the status of the real coordinator."""
    context.set_trailing_metadata(tuple(error.trailing_metadata() or ()))
    context.abort(error.code(), error.details() or "")
