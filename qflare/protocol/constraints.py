"""Constraints on message fields, as ``qflare/v1/constraints.proto`` declares them.

`find_violations` checks a whole message and names every field that breaks a constraint. The checks of a message
type are built from its descriptor once; a message of a few fields costs some microseconds.

Usage::

    for violation in find_violations(request):
        print(violation.field, violation.description)
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from qflare.v1 import constraints_pb2

MAX_VIOLATIONS: Final = 32
"""Most violations that are reported of one message."""

DEFAULT_MAX_TEXT: Final = 255
"""Longest text without a bound of its own, in characters."""

DEFAULT_MAX_BYTES: Final = 65_536
"""Longest bytes field without a bound of its own."""

DEFAULT_MAX_ITEMS: Final = 64
"""Most elements or entries of a field without a bound of its own."""

DEFAULT_MAX_KEY: Final = 100
"""Longest key of a map without a bound of its own, in characters."""

MIN_TIMESTAMP_S: Final = -62_135_596_800
"""0001-01-01T00:00:00Z in seconds since 1970."""

MAX_TIMESTAMP_S: Final = 253_402_300_799
"""9999-12-31T23:59:59Z in seconds since 1970."""

MAX_DURATION_S: Final = 315_576_000_000
"""About 10,000 years, the bound of google.protobuf.Duration."""

_NANOS: Final = 10**9
_MAX_SHOWN: Final = 40
_LISTED_NAMES: Final = 12
_HEX: Final = re.compile(r"[0-9a-f]*")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_FORMS: Final[dict[int, tuple[Callable[[str], bool], str]]] = {
    constraints_pb2.TEXT_FORM_UNSPECIFIED: (str.isprintable, "printable characters"),
    constraints_pb2.TEXT_FORM_ANY: (lambda text: "\0" not in text, "text without NUL"),
    constraints_pb2.TEXT_FORM_HEX: (
        lambda text: _HEX.fullmatch(text) is not None,
        "lower-case hex digits",
    ),
    constraints_pb2.TEXT_FORM_DIGEST: (
        lambda text: _DIGEST.fullmatch(text) is not None,
        "64 lower-case hex digits",
    ),
    constraints_pb2.TEXT_FORM_UUID: (
        lambda text: _UUID.fullmatch(text) is not None,
        "a UUID in lower case with hyphens",
    ),
}


class Violation(NamedTuple):
    """One broken constraint.

    Attributes:
        field: Path from the message, such as ``config.selection.capabilities[3].value``.
        description: What was found and what is wanted.
    """

    field: str
    description: str


class _FullError(Exception):
    """`MAX_VIOLATIONS` violations have been found."""


class _Violations(list[Violation]):
    """Violations of a message, up to `MAX_VIOLATIONS`."""

    def add(self, field: str, description: str) -> None:
        self.append(Violation(field, description))
        if len(self) >= MAX_VIOLATIONS:
            raise _FullError


_Explain: TypeAlias = Callable[[Any], str | None]
"""Returns what is wrong with a value, None if nothing is."""

_FieldCheck: TypeAlias = Callable[[Any, str, _Violations], None]
"""Checks one field of a message, given the path of the message."""


def find_violations(message: Message, prefix: str = "") -> list[Violation]:
    """Return the constraints that a message breaks, in the order of its fields; at most `MAX_VIOLATIONS`.

    Args:
        message: Any message; one without annotations has the constraints that every field has.
        prefix: Path of the message within what the caller sent, ending with a dot unless it is empty.
    """
    found = _Violations()
    with suppress(_FullError):
        _checks_of(message.DESCRIPTOR).check(message, prefix, found)
    return found


def find_field_violations(message: Message, name: str) -> list[Violation]:
    """Return the constraints that one field of a message breaks; at most `MAX_VIOLATIONS`.

    Args:
        message: Any message.
        name: Name of the field.
    """
    found = _Violations()
    with suppress(_FullError):
        _checks_of(message.DESCRIPTOR).of_field(name)(message, "", found)
    return found


class _MessageChecks:
    """The checks of one message type; built on first use, because types may be recursive."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._checks: tuple[_FieldCheck, ...] | None = None
        self._by_name: dict[str, _FieldCheck] = {}

    def of_field(self, name: str) -> _FieldCheck:
        """Return the check of one field."""
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name[name] = _field_check(self._descriptor.fields_by_name[name])
        return found

    def check(self, message: Any, path: str, found: _Violations) -> None:
        checks = self._checks
        if checks is None:
            checks = self._checks = tuple(map(_field_check, self._descriptor.fields))
        for check in checks:
            check(message, path, found)


@cache
def _checks_of(descriptor: Descriptor) -> _MessageChecks:
    return _MessageChecks(descriptor)


def constraint_of(field: FieldDescriptor) -> constraints_pb2.Constraint:
    """Return the annotation of a field; an empty one if it has none."""
    constraint: constraints_pb2.Constraint = field.GetOptions().Extensions[
        constraints_pb2.constraint
    ]
    return constraint


def _field_check(field: FieldDescriptor) -> _FieldCheck:
    constraint = constraint_of(field)
    if field.is_repeated:
        return _map_check(field, constraint) if _is_map(field) else _list_check(field, constraint)
    if field.message_type is not None:
        return _submessage_check(field, constraint)
    return _scalar_check(field, constraint)


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def _scalar_check(field: FieldDescriptor, constraint: constraints_pb2.Constraint) -> _FieldCheck:
    name, required, presence = field.name, constraint.required, field.has_presence
    explain = _scalar_rule(field, constraint)

    def check(message: Any, path: str, found: _Violations) -> None:
        value = getattr(message, name)
        if message.HasField(name) if presence else value:
            problem = explain(value)
            if problem is not None:
                found.add(path + name, problem)
        elif required:
            found.add(path + name, "required")

    return check


def _submessage_check(
    field: FieldDescriptor, constraint: constraints_pb2.Constraint
) -> _FieldCheck:
    name, required = field.name, constraint.required
    descend = None if constraint.checked_by_method else _value_check(field, constraint)

    def check(message: Any, path: str, found: _Violations) -> None:
        if not message.HasField(name):
            if required:
                found.add(path + name, "required")
        elif descend is not None:
            descend(getattr(message, name), path + name, found)

    return check


def _list_check(field: FieldDescriptor, constraint: constraints_pb2.Constraint) -> _FieldCheck:
    name, required = field.name, constraint.required
    most = constraint.max_items or DEFAULT_MAX_ITEMS
    descend = None if constraint.checked_by_method else _value_check(field, constraint)

    def check(message: Any, path: str, found: _Violations) -> None:
        items = getattr(message, name)
        if not items:
            if required:
                found.add(path + name, "required")
        elif len(items) > most:
            found.add(path + name, f"got {len(items)} elements, want at most {most}")
        elif descend is not None:
            for number, item in enumerate(items):
                descend(item, f"{path}{name}[{number}]", found)

    return check


def _map_check(field: FieldDescriptor, constraint: constraints_pb2.Constraint) -> _FieldCheck:
    name, required = field.name, constraint.required
    most = constraint.max_items or DEFAULT_MAX_ITEMS
    longest = constraint.max_key_length or DEFAULT_MAX_KEY
    entry = field.message_type
    assert entry is not None
    descend = _value_check(entry.fields_by_name["value"], constraint)

    def check(message: Any, path: str, found: _Violations) -> None:
        entries = getattr(message, name)
        if len(entries) > most:
            found.add(path + name, f"got {len(entries)} entries, want at most {most}")
        elif not entries and required:
            found.add(path + name, "required")
        else:
            for key, value in entries.items():
                where = f"{path}{name}[{_shown(key)}]"
                if isinstance(key, str) and not (0 < len(key) <= longest and key.isprintable()):
                    found.add(where, f"the name has to be 1 to {longest} printable characters")
                descend(value, where, found)

    return check


def _value_check(
    field: FieldDescriptor, constraint: constraints_pb2.Constraint
) -> Callable[[Any, str, _Violations], None]:
    """Return the check of a present value, called with its path."""
    kind = field.message_type
    if kind is None:
        return _explained(_scalar_rule(field, constraint))
    if kind.full_name == "google.protobuf.Timestamp":
        return _explained(_explain_timestamp)
    if kind.full_name == "google.protobuf.Duration":
        return _explained(_duration_rule(constraint))
    checks = _checks_of(kind)
    return lambda value, path, found: checks.check(value, path + ".", found)


def _explained(explain: _Explain) -> Callable[[Any, str, _Violations], None]:
    def check(value: Any, path: str, found: _Violations) -> None:
        problem = explain(value)
        if problem is not None:
            found.add(path, problem)

    return check


def _scalar_rule(field: FieldDescriptor, constraint: constraints_pb2.Constraint) -> _Explain:
    if field.enum_type is not None:
        return _enum_rule(field.enum_type)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _text_rule(constraint)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes_rule(constraint)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return lambda _: None
    is_float = field.type in {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}
    return _number_rule(constraint, default_least=-math.inf if is_float else 0)


def _text_rule(constraint: constraints_pb2.Constraint) -> _Explain:
    longest = constraint.max_length or DEFAULT_MAX_TEXT
    fits, wanted = _FORMS[constraint.form]

    def explain(text: str) -> str | None:
        if len(text) > longest:
            return f"got {len(text)} characters, want at most {longest}"
        return None if fits(text) else f"got {_shown(text)}, want {wanted}"

    return explain


def _bytes_rule(constraint: constraints_pb2.Constraint) -> _Explain:
    longest = constraint.max_length or DEFAULT_MAX_BYTES

    def explain(data: bytes) -> str | None:
        if len(data) <= longest:
            return None
        return f"got {len(data)} bytes, want at most {longest}"

    return explain


def _enum_rule(kind: EnumDescriptor) -> _Explain:
    known = kind.values_by_number

    def explain(number: int) -> str | None:
        if number in known:
            return None
        names = [value.name for value in kind.values if value.number]
        listed = ", ".join(names[:_LISTED_NAMES])
        return f"got number {number}, want {listed}"

    return explain


def _number_rule(constraint: constraints_pb2.Constraint, default_least: float) -> _Explain:
    least = constraint.at_least if constraint.HasField("at_least") else default_least
    most = constraint.at_most if constraint.HasField("at_most") else math.inf
    above = constraint.above if constraint.HasField("above") else -math.inf
    below = constraint.below if constraint.HasField("below") else math.inf
    wanted = _wanted(constraint, default_least)

    def explain(number: float) -> str | None:
        if least <= number <= most and above < number < below:
            return None  # false for NaN and, where no bound is given, for infinity
        return f"got {number}, want {wanted}"

    return explain


def _wanted(constraint: constraints_pb2.Constraint, default_least: float) -> str:
    words = []
    if constraint.HasField("above"):
        words.append(f"above {constraint.above:.16g}")
    elif constraint.HasField("at_least"):
        words.append(f"at least {constraint.at_least:.16g}")
    elif math.isfinite(default_least):
        words.append(f"at least {default_least:g}")
    if constraint.HasField("below"):
        words.append(f"below {constraint.below:.16g}")
    elif constraint.HasField("at_most"):
        words.append(f"at most {constraint.at_most:.16g}")
    return " and ".join(words) or "a finite number"


def _duration_rule(constraint: constraints_pb2.Constraint) -> _Explain:
    explain_number = _number_rule(constraint, default_least=0)

    def explain(duration: Any) -> str | None:
        seconds, nanos = duration.seconds, duration.nanos
        if not (0 <= seconds <= MAX_DURATION_S and 0 <= nanos < _NANOS):
            return (
                f"got {seconds} seconds and {nanos} nanos, want 0 to {MAX_DURATION_S} seconds"
                f" and 0 to {_NANOS - 1} nanos"
            )
        return explain_number(seconds + nanos / _NANOS)

    return explain


def _explain_timestamp(timestamp: Any) -> str | None:
    seconds, nanos = timestamp.seconds, timestamp.nanos
    if MIN_TIMESTAMP_S <= seconds <= MAX_TIMESTAMP_S and 0 <= nanos < _NANOS:
        return None
    return f"got {seconds} seconds and {nanos} nanos since 1970, want a time in the years 1 to 9999"


def _shown(value: object) -> str:
    """Return a value in short, printable ASCII for a path or a message."""
    return ascii(value[:_MAX_SHOWN]) if isinstance(value, str) else str(value)
