"""Arguments of public functions, checked before anything is sent: what is wrong with them is an `InvalidArgumentError`.

What it does not do: know what an argument means, or check what only the coordinator can tell.
"""

import math
import operator
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, SupportsFloat, SupportsIndex, TypeVar

import numpy as np
from google.protobuf.message import Message

from qflare.addresses import AddressError, require_address
from qflare.tensors import Array, DType, InvalidManifestError
from qflare_client.errors import InvalidArgumentError

LONGEST_TIMEOUT_S: Final = 1e9
"""Longest deadline of a call, in seconds: thirty years."""

MAX_INT64: Final = 2**63 - 1
MAX_VERSION: Final = 2**31 - 1

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def message(kind: type[M], /, **fields: Any) -> M:
    """Return a message with these fields.

    Raises:
        InvalidArgumentError: A field cannot hold its value: of another type, out of range, text that is not Unicode.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InvalidArgumentError(f"{kind.DESCRIPTOR.name}: {error}") from error


def instance(what: str, value: object, kind: type[T]) -> T:
    """Return a value that is an instance of a class.

    Args:
        what: Names it in the error.
        value: As it was given.
        kind: The class.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{what}: got {type(value).__name__}, want {kind.__name__}")
    return value


def instances(what: str, values: object, kind: type[Any]) -> None:
    """Check that a list holds values of one type only.

    Raises:
        InvalidArgumentError: It is no list, or holds another value.
    """
    if not isinstance(values, Sequence):
        raise InvalidArgumentError(f"{what}: got {type(values).__name__}, want a list")
    for value in values:
        instance(what, value, kind)


def address(value: object) -> str:
    """Return the address of a coordinator: host:port, or a gRPC name with its scheme.

    Raises:
        InvalidArgumentError: It is something else.
    """
    try:
        return require_address(text("address", value))
    except AddressError as error:
        raise InvalidArgumentError(str(error)) from error


def flag(what: str, value: object) -> bool:
    """Return a bool; nothing else counts as one: the text "no" is true to Python.

    Raises:
        InvalidArgumentError: It is something else.
    """
    return bool(value) if isinstance(value, np.bool_) else instance(what, value, bool)


def one_of(what: str, value: object, choices: tuple[T, ...]) -> T:
    """Return a value that is one of several.

    Raises:
        InvalidArgumentError: It is not.
    """
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    wanted = " or ".join(map(repr, choices))
    raise InvalidArgumentError(f"{what}: got {value!r:.100}, want {wanted}")


def check_callable(what: str, value: object, *, is_optional: bool = False) -> None:
    """Check that a value can be called.

    Args:
        what: Names it in the error.
        value: As it was given.
        is_optional: None is good as well.

    Raises:
        InvalidArgumentError: It cannot.
    """
    if not (callable(value) or (is_optional and value is None)):
        raise InvalidArgumentError(f"{what}: got {type(value).__name__}, want a function")


def optional(what: str, value: T | None, kind: type[T]) -> T | None:
    """Return a value that is None or an instance of a class; see `instance`."""
    return None if value is None else instance(what, value, kind)


def text(what: str, value: object, *, is_secret: bool = False) -> str:
    """Return text that can be sent.

    Args:
        what: Names it in the error.
        value: As it was given.
        is_secret: The error does not show it.

    Raises:
        InvalidArgumentError: It is no str, or has code points that UTF-8 cannot encode.
    """
    shown = "a value" if is_secret else f"{value!r:.200}"
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what}: got {shown}, want a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{what}: got {shown}, want valid Unicode") from None
    return value


def texts(what: str, value: object) -> tuple[str, ...]:
    """Return texts that can be sent; see `text`.

    Raises:
        InvalidArgumentError: It is no list or tuple of such texts.
    """
    if not isinstance(value, list | tuple):
        raise InvalidArgumentError(f"{what}: got {type(value).__name__}, want a list of str")
    return tuple(text(f"{what}[{index}]", item) for index, item in enumerate(value))


def tensors(what: str, value: object) -> Mapping[str, Array]:
    """Return a mapping of names to arrays.

    Raises:
        InvalidArgumentError: It is something else, or an array has elements that are no numbers.
    """
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{what}: got {type(value).__name__}, want a mapping to arrays")
    for name, array in value.items():
        text(f"a name in {what}", name)
        if not isinstance(array, np.ndarray | np.generic):
            raise InvalidArgumentError(
                f"{what}[{name!r}]: got {type(array).__name__}, want an array"
            )
        try:
            DType.from_numpy(array.dtype)
        except InvalidManifestError as error:
            raise InvalidArgumentError(f"{what}[{name!r}]: {error}") from error
    return value


def path(what: str, value: object) -> Path:
    """Return a path, given as one or as text.

    Raises:
        InvalidArgumentError: It is something else, is empty, or holds a NUL.
    """
    if not isinstance(value, str | os.PathLike):
        raise InvalidArgumentError(f"{what}: got {type(value).__name__}, want a path")
    name = os.fspath(value)
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgumentError(
            f"{what}: got {name!r:.200}, want a path, not empty, without NUL"
        )
    return Path(name)


def policy(value: object, known: Collection[str], required: Collection[str]) -> dict[str, Any]:
    """Return the entries of a policy file in TOML.

    Args:
        value: Path of the file.
        known: Names of all entries.
        required: Names of those without a default.

    Raises:
        InvalidArgumentError: The file cannot be read, an entry is unknown, or a required one is missing.
    """
    file = path("path", value)
    try:
        entries: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{file} cannot be read: {error}") from error
    unknown = sorted(entries.keys() - set(known))
    missing = sorted(set(required) - entries.keys())
    if unknown or missing:
        raise InvalidArgumentError(
            f"{file}: {'unknown' if unknown else 'missing'} entry {(unknown or missing)[0]}"
        )
    return entries


def whole(what: str, value: object, low: int = 0, high: int = MAX_INT64) -> int:
    """Return an integer within bounds; integers of numpy are integers, booleans are not.

    Raises:
        InvalidArgumentError: It is no such integer.
    """
    is_integer = isinstance(value, int | SupportsIndex) and not isinstance(value, bool | np.ndarray)
    if not is_integer or not low <= operator.index(value) <= high:  # type: ignore[arg-type]
        raise InvalidArgumentError(f"{what}: got {value!r:.200}, want an integer, {low} to {high}")
    return operator.index(value)  # type: ignore[arg-type]


def number(what: str, value: object) -> float:
    """Return a finite number as a float; numbers of other libraries are numbers, text and booleans are not.

    Raises:
        InvalidArgumentError: It is no finite number.
    """
    try:
        if isinstance(value, float | int | SupportsFloat) and not isinstance(
            value, bool | np.bool_
        ):
            converted = float(value)
            if math.isfinite(converted):
                return converted
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgumentError(f"{what}: got {value!r:.200}, want a finite number")


def positive(what: str, value: object, at_most: float = LONGEST_TIMEOUT_S) -> float:
    """Return a number above 0, such as a deadline in seconds.

    Raises:
        InvalidArgumentError: It is 0, below or above the bound, or no number.
    """
    converted = number(what, value)
    if not 0.0 < converted <= at_most:
        raise InvalidArgumentError(f"{what}: got {value!r:.200}, want above 0, at most {at_most:g}")
    return converted


def not_negative(what: str, value: object, at_most: float = LONGEST_TIMEOUT_S) -> float:
    """Return a number of 0 or above, such as a delay in seconds.

    Args:
        what: Names it in the error.
        value: As it was given.
        at_most: Bound; infinite for none, and then infinity is a number too.

    Raises:
        InvalidArgumentError: It is below 0 or above the bound, or no number.
    """
    is_endless = isinstance(value, float) and value == at_most == math.inf
    converted = math.inf if is_endless else number(what, value)
    if not 0.0 <= converted <= at_most:
        raise InvalidArgumentError(f"{what}: got {value!r:.200}, want 0 to {at_most:g}")
    return converted


def session_id(value: object, absent: str | None = None) -> str:
    """Return the id of a training session; None stands for `absent` where there is such a value."""
    if value is None and absent is not None:
        return absent
    return text("training_session_id", value)


def version(what: str, value: object) -> int | None:
    """Return a version, or None."""
    return None if value is None else whole(what, value, 0, MAX_VERSION)
