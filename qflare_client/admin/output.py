"""Output formats: aligned tables for people, proto JSON for programs."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.terminal import complain, printable, say
from qflare.v1 import training_pb2

NONE: Final = "-"
Column: TypeAlias = tuple[str, Callable[[Any], object]]
"""A heading, and a function that formats its cell for a message."""


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as proto JSON, with the proto field names that grpcurl prints.

    Fields with their default value are included.
    """
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(message: Message) -> None:
    """Print a message as indented JSON."""
    say(json.dumps(as_json(message), indent=2))


def print_json_line(message: Message) -> None:
    """Print a message as JSON in one line."""
    say(json.dumps(as_json(message)), flush=True)


def word(message: Message, field: str) -> str:
    """Return an enum field in lowercase: active for DEVICE_STATE_ACTIVE; a later release's value by its number."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    assert descriptor.enum_type is not None
    values = descriptor.enum_type.values_by_number
    number = getattr(message, field)
    if number not in values:
        return f"unknown ({number})"
    name = str(values[number].name)
    prefix = str(values[0].name).removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower()


def moment(message: Message, field: str) -> str:
    """Format a timestamp: local time, to the second."""
    if not message.HasField(field):
        return NONE
    at: Timestamp = getattr(message, field)
    local = at.ToDatetime(tzinfo=UTC).astimezone()
    return local.strftime("%Y-%m-%d %H:%M:%S")


def span(message: Message, field: str) -> str:
    """Format a duration."""
    if not message.HasField(field):
        return NONE
    duration: Duration = getattr(message, field)
    return seconds(duration.ToNanoseconds() / 1e9)


def seconds(value: float) -> str:
    """Format seconds: 950 ms, 12.3 s, 4 min 10 s."""
    if value < 1:
        return f"{value * 1000:.1f} ms"
    if value < 60:  # noqa: PLR2004  # a minute
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:  # noqa: PLR2004  # an hour
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size(value: int) -> str:
    """Format a number of bytes with binary units."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:  # noqa: PLR2004  # binary units
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def optional(message: Message, field: str) -> object:
    """Format a field that may be absent."""
    return getattr(message, field) if message.HasField(field) else None


def round_of(session: Any, number: int) -> str:
    """Return a round with the number of rounds, which grows by those that made no version."""
    return f"{number}/{max(number, session.config.total_rounds)}"


def best_version(session: Any) -> str | None:
    """Return the best version of a training session by its objective, and what its metric was measured on."""
    if not session.HasField("best"):
        return None
    best = session.best
    return f"{best.metric} {best.value:.4g}, version {best.version} ({measured_on(best.source)})"


def measured_on(source: int) -> str:
    """Return what a metric was measured on as a person is told."""
    is_held_out = source == training_pb2.METRIC_SOURCE_HELD_OUT
    return "held out" if is_held_out else "training data only"


def metrics(values: Any) -> str:
    """Format metrics by name, in one line."""
    return " ".join(f"{name}={values[name]:.4g}" for name in sorted(values)) or NONE


def notice_lines(notices: Iterable[Any]) -> list[str]:
    """Return what a training session waits for and what to do about it, two lines for each notice."""
    return [line for item in notices for line in (f"! {item.text}", f"  try: {item.remedy}")]


def version_metrics(values: Any) -> str:
    """Return the metrics of a version in one line, with a remark where none was measured on held-out data."""
    only_training = values and all(name.startswith("train_") for name in values)
    return metrics(values) + (" (training data only)" if only_training else "")


def table(messages: Iterable[Any], columns: Sequence[Column]) -> str:
    """Format messages as an aligned table with headings."""
    headings = [heading for heading, _ in columns]
    rows = [[_cell(read(message)) for _, read in columns] for message in messages]
    if not rows:
        return "none"
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    )


def facts(message: Any, columns: Sequence[Column]) -> str:
    """Format one message as lines of heading and value."""
    width = max(len(heading) for heading, _ in columns)
    return "\n".join(f"{heading.ljust(width)}  {_cell(read(message))}" for heading, read in columns)


def _cell(value: object) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(" ".join(str(value).split()))


def note(text: str) -> None:
    """Print a note to a person, apart from the response."""
    complain(text)


def parse_moment(text: str) -> Timestamp:
    """Parse a time from the command line: ISO 8601, local if no zone is given.

    Raises:
        ValueError: The text is malformed.
    """
    at = datetime.fromisoformat(text)
    message = Timestamp()
    message.FromDatetime(at.astimezone(UTC))
    return message


def parse_seconds(value: float) -> Duration:
    """Return a duration in seconds as a message."""
    message = Duration()
    message.FromNanoseconds(int(value * 1e9))
    return message
