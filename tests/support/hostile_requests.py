"""Requests of any method, right by the constraints of their fields, and ways to spoil them."""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Final

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from qflare.protocol.constraints import constraint_of
from qflare.v1 import admin_service_pb2, constraints_pb2, coordinator_service_pb2

MAX_DEPTH: Final = 6
CHANCE_OF_FIELD: Final = 0.5
TEXTS: Final = (
    "",
    "\0",
    "a\0b",
    "\x1b[31m",
    "\u202e",
    "two\nlines",
    "x" * 256,
    "\N{SNOWMAN}" * 5000,
    "' OR 1=1 --",
    "%",
    "-1",
    "00000000-0000-0000-0000-000000000000",
    base64.urlsafe_b64encode(b"[" * 2500).decode(),
    base64.urlsafe_b64encode(json.dumps(["0" * 16, 1e400, None, {}]).encode()).decode(),
    base64.urlsafe_b64encode(b'["' + b"0" * 16 + b'", 1' + b"0" * 2000 + b"]").decode(),
)
INTEGERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 2**31 - 1, -(2**31), 1_000_001),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 2**31),
}
FLOATS: Final = (0.0, -0.0, -1.0, 5e-324, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
ENUMS: Final = (0, 99, -1, 2**31 - 1, -(2**31))
SECONDS: Final = (0, -1, 2**63 - 1, -(2**63), 253_402_300_800, -62_135_596_801, 315_576_000_001)
NANOS: Final = (0, -1, 10**9, 2**31 - 1, -(2**31))
TIMES: Final = frozenset({"google.protobuf.Timestamp", "google.protobuf.Duration"})


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    """Yield the path of every method that a coordinator serves, and what describes it."""
    modules = (admin_service_pb2, coordinator_service_pb2, health_pb2, reflection_pb2)
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}", method


def caller_of(channel: grpc.Channel, path: str, method: MethodDescriptor) -> Any:
    """Return what sends bytes to a method."""
    make: Any = {
        (False, False): channel.unary_unary,
        (True, False): channel.stream_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    return make(path)


def is_watch(path: str) -> bool:
    """Return whether a method answers only when something happens."""
    return path.rpartition("/")[2].startswith("Watch")


def is_map(field: FieldDescriptor) -> bool:
    """Return whether a field is a map."""
    kind = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


class RequestMaker:
    """Makes requests and spoils them.

    Args:
        random: Decides everything.
        known: Values by the name of a field, such as ids that exist; used for most fields of that name.
    """

    def __init__(self, random: Random, known: Mapping[str, Sequence[Any]]) -> None:
        self.random = random
        self._known = known

    def message(self, kind: Descriptor, depth: int = 0) -> Message:
        """Return a message whose fields keep their constraints; not all of them are set."""
        made: Any = GetMessageClass(kind)()
        for field in kind.fields:
            wanted = constraint_of(field).required or field.name in self._known
            if depth < MAX_DEPTH and (wanted or self.random.random() < CHANCE_OF_FIELD):
                self._set(made, field, depth)
        message: Message = made
        return message

    def spoil(self, message: Any) -> None:
        """Put a value that may be anything into one field, however deep."""
        fields = message.DESCRIPTOR.fields
        if message.DESCRIPTOR.full_name in TIMES:
            message.seconds = self.random.choice(SECONDS)
            message.nanos = self.random.choice(NANOS)
        elif fields:
            self._spoil_field(message, self.random.choice(fields))

    def spoil_bytes(self, data: bytes) -> bytes:
        """Change, insert, repeat or drop some bytes."""
        changed = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(changed) + 1)
            action = self.random.randrange(4)
            if action == 0:
                changed[at:at] = self.random.randbytes(self.random.randint(1, 8))
            elif action == 1:
                del changed[at : at + self.random.randint(1, 8)]
            elif action == 2 and at < len(changed):
                changed[at] ^= 1 << self.random.randrange(8)
            else:
                changed[at:at] = changed[: self.random.randint(0, 64)]
        return bytes(changed)

    def hostile(self, field: FieldDescriptor) -> Any:
        """Return a value of a scalar field that may be anything."""
        if field.enum_type is not None:
            return self.random.choice(ENUMS)
        if field.type == FieldDescriptor.TYPE_STRING:
            return self.random.choice(TEXTS)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.random.randbytes(self.random.choice((0, 1, 32, 200, 70_000)))
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self.random.random() < 0.5
        return self.random.choice(INTEGERS.get(field.cpp_type, FLOATS))

    def _spoil_field(self, message: Any, field: FieldDescriptor) -> None:
        if is_map(field):
            self._spoil_map(message, field)
        elif field.message_type is not None:
            items = getattr(message, field.name)
            self.spoil(items.add() if field.is_repeated else self._present(message, field))
        elif field.is_repeated:
            getattr(message, field.name).append(self.hostile(field))
        else:
            setattr(message, field.name, self.hostile(field))

    def _present(self, message: Any, field: FieldDescriptor) -> Any:
        inner = getattr(message, field.name)
        if not message.HasField(field.name):
            inner.SetInParent()
        return inner

    def _spoil_map(self, message: Any, field: FieldDescriptor) -> None:
        entry = field.message_type
        assert entry is not None
        value = entry.fields_by_name["value"]
        key = self.random.choice((*TEXTS, "loss"))
        if value.message_type is None:
            getattr(message, field.name)[key] = self.hostile(value)

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        if is_map(field):
            entry = field.message_type
            assert entry is not None
            value = entry.fields_by_name["value"]
            if value.message_type is None:
                getattr(message, field.name)["loss"] = self._valid(value, constraint_of(field))
        elif field.message_type is not None:
            inner = self.message(field.message_type, depth + 1)
            if field.message_type.full_name in TIMES:
                inner = self._time(field)
            target = getattr(message, field.name)
            (target.add() if field.is_repeated else target).CopyFrom(inner)
        elif field.is_repeated:
            getattr(message, field.name).append(self._valid(field, constraint_of(field)))
        else:
            setattr(message, field.name, self._valid(field, constraint_of(field)))

    def _time(self, field: FieldDescriptor) -> Message:
        kind = field.message_type
        assert kind is not None
        made: Any = GetMessageClass(kind)()
        made.seconds = self.random.choice((1, 60)) if kind.name == "Duration" else 1_700_000_000
        made.nanos = self.random.choice((0, 999_999_999))
        time: Message = made
        return time

    def _valid(self, field: FieldDescriptor, constraint: constraints_pb2.Constraint) -> Any:
        known = self._known.get(field.name)
        if known:
            return self.random.choice(known)
        if field.enum_type is not None:
            return self.random.choice(field.enum_type.values).number
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.random.randbytes(self.random.choice((0, 32, 74, 1120)))
        if field.type == FieldDescriptor.TYPE_STRING:
            return _TEXT_OF_FORM[constraint.form](self.random)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self.random.random() < 0.5
        if field.cpp_type in INTEGERS:
            return self.random.randint(0, 3)
        return self.random.choice((0.25, 0.5, 0.75))


_TEXT_OF_FORM: Final[dict[int, Callable[[Random], str]]] = {
    constraints_pb2.TEXT_FORM_UNSPECIFIED: lambda random: random.choice(("a", "device_type", "é")),
    constraints_pb2.TEXT_FORM_ANY: lambda random: random.choice(("a", "two\nlines")),
    constraints_pb2.TEXT_FORM_HEX: lambda random: random.randbytes(16).hex(),
    constraints_pb2.TEXT_FORM_DIGEST: lambda random: random.randbytes(32).hex(),
    constraints_pb2.TEXT_FORM_UUID: lambda _: "0f0f0f0f-0000-4000-8000-000000000000",
}
