"""Results of a process of the pool in a file: the record of what a function of `worker` returned or raised.

A file begins with one line of JSON: whether the result is a list, and kind and lengths of the fields of each item. The
fields follow, one after the other. Nothing in it is code, and no object is made but those of `Result`.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias

from qflare.v1 import security_pb2
from qflare_simulation.worker import MAX_TEXT, Failed, Left, Trained

_MAX_LINE: Final = 1000
"""Most characters of a message, and of each frame of a traceback."""


class Raised(NamedTuple):
    """What a function raised.

    Attributes:
        message: Type and text of the error.
        text: Its traceback.
    """

    message: str
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return the record of an error."""
        lines = [line[:_MAX_LINE] for line in traceback.format_exception(error)]
        return cls(lines[-1].strip(), "".join(lines)[-MAX_TEXT:])


Item: TypeAlias = (
    bytes | dict[str, float] | Trained | Failed | Left | security_pb2.EvaluationStatement | Raised
)
Result: TypeAlias = Item | list[Item]
"""What functions of `worker` return, and what any function may raise."""


def write(path: Path, result: Result) -> None:
    """Write a result to a new file.

    Raises:
        TypeError: It is none of `Result`.
        OSError: The file cannot be written.
    """
    items = result if isinstance(result, list) else [result]
    records = [(name, kind.fields(item)) for item in items for name, kind in [_kind_of(item)]]
    lengths = [[name, [len(field) for field in fields]] for name, fields in records]
    head = json.dumps({"is_list": isinstance(result, list), "items": lengths})
    with path.open("xb") as file:
        file.write(f"{head}\n".encode())
        for _, fields in records:
            file.writelines(fields)


def read(path: Path) -> Result:
    """Return the result in a file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        head = json.loads(file.readline())
        items: list[Item] = [
            _KINDS[name].make([file.read(length) for length in lengths])
            for name, lengths in head["items"]
        ]
    return items if head["is_list"] else items[0]


class _Kind(NamedTuple):
    """One type of items: into fields and back."""

    type: type
    fields: Callable[[Any], list[bytes]]
    make: Callable[[list[bytes]], Any]


def _texts(values: tuple[str, ...]) -> list[bytes]:
    return [value.encode(errors="surrogatepass") for value in values]


def _text(field: bytes) -> str:
    return field.decode(errors="surrogatepass")


def _trained_fields(item: Trained) -> list[bytes]:
    return [item.statement, item.chunk_digests, *_texts((item.kept,)), *item.chunks]


def _trained(fields: list[bytes]) -> Trained:
    statement, chunk_digests, kept, *chunks = fields
    return Trained(statement, chunk_digests, chunks, _text(kept))


def _of_texts(kind: type[Any]) -> _Kind:
    return _Kind(kind, _texts, lambda fields: kind(*map(_text, fields)))


_KINDS: Final[Mapping[str, _Kind]] = {
    "bytes": _Kind(bytes, lambda item: [item], lambda fields: fields[0]),
    "metrics": _Kind(
        dict, lambda item: [json.dumps(item).encode()], lambda fields: json.loads(fields[0])
    ),
    "trained": _Kind(Trained, _trained_fields, _trained),
    "failed": _of_texts(Failed),
    "left": _of_texts(Left),
    "evaluation": _Kind(
        security_pb2.EvaluationStatement,
        lambda item: [item.SerializeToString()],
        lambda fields: security_pb2.EvaluationStatement.FromString(fields[0]),
    ),
    "raised": _of_texts(Raised),
}


def _kind_of(item: object) -> tuple[str, _Kind]:
    for name, kind in _KINDS.items():
        if type(item) is kind.type:
            return name, kind
    raise TypeError(f"a process of the pool cannot return {type(item).__name__}")
