"""Element rules of payloads, checked while the payload arrives.

Floating-point elements are finite, booleans are 0 or 1, integers are free; a caller may add stricter
rules for single tensors. Elements are checked in place, without copies, at memory speed.

This module does not hash or assemble payloads. Import these names from
`qflare.tensors`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final, Protocol, TypeAlias

import numpy as np

from qflare.tensors.manifest import Array, DType, Manifest, TensorSpec

BytesLike: TypeAlias = bytes | bytearray | memoryview
SUMMED_BYTES: Final = 65_536
SINGLE_BYTES: Final = 4  # narrower elements overflow in sums of ordinary numbers


class InvalidPayloadError(ValueError):
    """Payload bytes violate the rules of their manifest."""


class PayloadSizeError(InvalidPayloadError):
    """A payload or one of its chunks has too few or too many bytes."""


class NonFiniteError(InvalidPayloadError):
    """A floating-point element is NaN or infinite."""


class ElementRule(Protocol):
    """Condition on every element of a tensor.

    A rule keeps no state: one serves any number of payloads at once.
    """

    @property
    def error(self) -> type[InvalidPayloadError]:
        """Exception type raised when an element breaks the rule."""

    @property
    def wanted(self) -> str:
        """The rule in words, as in `wanted a finite number`."""

    def first_bad(self, elements: Array, previous: Array | None) -> int | None:
        """Return the index of the first element that breaks the rule.

        Args:
            elements: The next elements of the tensor, at least one.
            previous: The element before them, shape (1,); None at the tensor's beginning.
        """


class Finite:
    """Neither NaN nor infinite; of any floating-point type."""

    error = NonFiniteError
    wanted = "a finite number"

    def first_bad(self, elements: Array, previous: Array | None = None) -> int | None:  # noqa: ARG002
        """See `ElementRule`.

        NaN and infinity are the bit patterns at and above that of infinity, of either sign. Two
        integer maxima find them without writing anything: 20 GB/s where isfinite, on 16-bit
        elements, does 1. For few elements one sum says enough most of the time: it is finite only if
        all of them are.
        """
        if elements.nbytes <= SUMMED_BYTES and elements.itemsize >= SINGLE_BYTES:
            with np.errstate(all="ignore"):
                if math.isfinite(np.add.reduce(elements)):
                    return None
        size_bytes = elements.itemsize
        positive, negative = elements.view(f"<i{size_bytes}"), elements.view(f"<u{size_bytes}")
        infinity = int(np.array(np.inf, elements.dtype).view(positive.dtype))
        sign = 1 << (8 * size_bytes - 1)
        if positive.max() < infinity and negative.max() < infinity + sign:
            return None
        return int(np.argmax((negative & (sign - 1)) >= infinity))


class ZeroOrOne:
    """A boolean's byte."""

    error = InvalidPayloadError
    wanted = "0 or 1"

    def first_bad(self, elements: Array, previous: Array | None = None) -> int | None:  # noqa: ARG002
        """See `ElementRule`; elements of type bool are checked as bytes."""
        raw = elements.view(np.uint8)
        return int(np.argmax(raw > 1)) if raw.max() > 1 else None


_FINITE = Finite()
_ZERO_OR_ONE = ZeroOrOne()


def default_rule(dtype: DType) -> ElementRule | None:
    """Return the rule of all tensors of an element type; None for integers, which are free."""
    if dtype.is_float:
        return _FINITE
    return _ZERO_OR_ONE if dtype is DType.BOOL else None


def check_elements(name: str, array: Array, rule: ElementRule | None = None) -> None:
    """Check a whole array.

    Args:
        name: Named in the error.
        array: Of any shape; copied when it is not contiguous or not little-endian.
        rule: That of the element type when not given.

    Raises:
        NonFiniteError: An element is NaN or infinite.
        InvalidPayloadError: A boolean's byte is neither 0 nor 1, or an element breaks the rule given.
    """
    spec = TensorSpec(name, DType.from_numpy(array.dtype), array.shape)
    rule = rule or default_rule(spec.dtype)
    if rule is not None and array.size:
        canonical = np.ascontiguousarray(array, spec.dtype.numpy).reshape(-1)
        _Run(spec.dtype, rule, (spec,)).check(0, canonical)


class FiniteCheck:
    """Check of the elements of a payload that arrives in pieces of any size.

    An element that a boundary cuts is checked when its last byte arrives. Pieces are not kept.

    Args:
        manifest: Describes the payload.
        rules: For tensors, by name, that have a stricter rule than that of their element type, which
            the stricter rule replaces.
    """

    def __init__(self, manifest: Manifest, rules: Mapping[str, ElementRule] | None = None) -> None:
        self._manifest = manifest
        self._runs = _runs(manifest, rules or {})
        self._run = next(self._runs, None)
        self._checked_count = 0  # elements of the current run
        self._previous: Array | None = None  # the last of them
        self._cut = b""  # the first bytes of an element whose rest has not arrived
        self._received_bytes = 0

    def feed(self, chunk: BytesLike) -> None:
        """Check the elements that the next bytes complete.

        Raises:
            NonFiniteError: An element is NaN or infinite; names the tensor and the element's index
                in the flattened tensor.
            InvalidPayloadError: A boolean is neither 0 nor 1, or an element breaks its own rule.
            PayloadSizeError: More bytes than the manifest has.
        """
        view = memoryview(chunk).cast("B")
        self._received_bytes += len(view)
        while view:
            if self._run is None:
                raise PayloadSizeError(
                    f"payload: got at least {self._received_bytes} bytes, "
                    f"wanted {self._manifest.size_bytes}"
                )
            view = view[self._check_some(self._run, view) :]
            if self._checked_count == self._run.element_count:
                self._run = next(self._runs, None)
                self._checked_count = 0
                self._previous = None

    def finish(self) -> None:
        """State that all bytes have been fed.

        Raises:
            PayloadSizeError: Fewer bytes came than the manifest has.
        """
        if self._received_bytes != self._manifest.size_bytes:
            raise PayloadSizeError(
                f"payload: got {self._received_bytes} bytes, wanted {self._manifest.size_bytes}"
            )

    def _check_some(self, run: "_Run", view: memoryview) -> int:
        """Check what completes a cut element, or all whole ones; return the bytes consumed."""
        itemsize = run.dtype.itemsize
        if self._cut or len(view) < itemsize:
            count_bytes = min(itemsize - len(self._cut), len(view))
            self._cut += view[:count_bytes]
            if len(self._cut) == itemsize:
                self._check_elements(run, memoryview(self._cut))
                self._cut = b""
            return count_bytes
        left_bytes = (run.element_count - self._checked_count) * itemsize
        count_bytes = min(left_bytes, len(view) // itemsize * itemsize)
        self._check_elements(run, view[:count_bytes])
        return count_bytes

    def _check_elements(self, run: "_Run", view: memoryview) -> None:
        elements = np.frombuffer(view, run.dtype.numpy)
        run.check(self._checked_count, elements, self._previous)
        self._checked_count += len(elements)
        self._previous = elements[-1:].copy()  # a view would keep the piece


@dataclass(frozen=True)
class _Run:
    """Consecutive tensors of one element type and rule, which are checked as if they were one.

    It keeps the cost of a payload of many small tensors near that of one large tensor.
    """

    dtype: DType
    rule: ElementRule | None
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def element_count(self) -> int:
        return sum(spec.element_count for spec in self.tensors)

    def check(self, start: int, elements: Array, previous: Array | None = None) -> None:
        """Check elements, at least one, from index `start` of the run on; `previous` is the one before."""
        bad = None if self.rule is None else self.rule.first_bad(elements, previous)
        if self.rule is None or bad is None:
            return
        name, index = self._locate(start + bad)
        got = elements.view(np.uint8)[bad] if self.dtype is DType.BOOL else elements[bad]
        raise self.rule.error(
            f"tensor {name!r}, element {index}: got {got}, wanted {self.rule.wanted}"
        )

    def _locate(self, index: int) -> tuple[str, int]:
        """Return the tensor of an element of the run, and the element's index in the tensor."""
        for spec in self.tensors[:-1]:
            if index < spec.element_count:
                return spec.name, index
            index -= spec.element_count
        return self.tensors[-1].name, index


def _runs(manifest: Manifest, rules: Mapping[str, ElementRule]) -> Iterator[_Run]:
    def key(spec: TensorSpec) -> tuple[DType, ElementRule | None]:
        return spec.dtype, rules.get(spec.name, default_rule(spec.dtype))

    filled = (spec for spec in manifest.tensors if spec.size_bytes)
    for (dtype, rule), specs in groupby(filled, key=key):
        yield _Run(dtype, rule, tuple(specs))
