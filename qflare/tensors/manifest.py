"""Manifests: which tensors a payload holds, and the order and layout of its bytes.

A *manifest* names the tensors of a model or an update. Its *payload* is the tensors' bytes one
after the other, each in C order, little-endian, without padding.

Invariants: a `TensorSpec` or `Manifest` is always valid, because the constructors reject
invalid values; equal layouts have equal layout digests.

This module does not touch payload bytes (see `qflare.tensors.payload`). Big-endian hosts cannot use
bfloat16 (a limit of `ml_dtypes`). Import these names from `qflare.tensors`.
"""

import enum
import hashlib
import math
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Self, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qflare.v1 import tensor_pb2

CHUNK_BYTES = 2**20
"""Size of every chunk of a payload but the last, in bytes. Chunk `i` is
`payload[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]`; a payload of zero bytes has no chunk."""

MAX_NAME_BYTES = 256
"""Longest tensor name, in bytes of UTF-8."""

MAX_RANK = 32
"""Most dimensions of a tensor: what every supported numpy can represent."""

_MAX_INT64 = 2**63 - 1
_LAYOUT_DOMAIN = b"qflare/v1/layout"

Array: TypeAlias = npt.NDArray[Any]


class InvalidManifestError(ValueError):
    """A manifest is malformed, exceeds its limits, or does not describe the arrays it came with."""


class DType(enum.IntEnum):
    """Element type of a tensor; the value is the number of the proto enum `qflare.v1.Dtype`.

    Attributes:
        numpy: The numpy dtype of the payload's elements, little-endian.
        itemsize: Bytes of one element.
        is_float: Whether elements are floating-point numbers.
        safetensors_name: The dtype's name in a safetensors header.
    """

    FLOAT32 = 1, "<f4", "F32"
    FLOAT64 = 2, "<f8", "F64"
    FLOAT16 = 3, "<f2", "F16"
    BFLOAT16 = 4, ml_dtypes.bfloat16, "BF16"
    INT8 = 5, "<i1", "I8"
    INT16 = 6, "<i2", "I16"
    INT32 = 7, "<i4", "I32"
    INT64 = 8, "<i8", "I64"
    UINT8 = 9, "<u1", "U8"
    UINT16 = 10, "<u2", "U16"
    UINT32 = 11, "<u4", "U32"
    UINT64 = 12, "<u8", "U64"
    BOOL = 13, "?", "BOOL"

    numpy: np.dtype[Any]
    itemsize: int
    is_float: bool
    safetensors_name: str

    def __new__(cls, number: int, numpy: npt.DTypeLike, safetensors_name: str) -> Self:
        """Make a member from its row of the table above."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.numpy = np.dtype(numpy)
        member.itemsize = member.numpy.itemsize
        member.is_float = "F" in safetensors_name
        member.safetensors_name = safetensors_name
        return member

    @staticmethod
    @cache
    def from_number(number: int) -> "DType":
        """Return the element type with a number of the proto enum.

        Raises:
            InvalidManifestError: The number is unknown, or 0 for unspecified.
        """
        for member in DType:
            if member == number:
                return member
        raise InvalidManifestError(
            f"dtype: got number {number}, wanted one of {_dtype_names()}"
            "; if a later release made it, upgrade qflare"
        )

    @staticmethod
    @cache
    def from_numpy(dtype: np.dtype[Any]) -> "DType":
        """Return the element type of a numpy dtype of either byte order.

        Raises:
            InvalidManifestError: No element type corresponds (complex, object, text, ...).
        """
        for member in DType:
            if dtype.newbyteorder("<") == member.numpy:
                return member
        raise InvalidManifestError(f"dtype: got {dtype}, wanted one of {_dtype_names()}")

    @staticmethod
    def from_safetensors(name: str) -> "DType":
        """Return the element type that a safetensors header calls `name`.

        Raises:
            InvalidManifestError: No element type corresponds, for example for `F8_E4M3`.
        """
        for member in DType:
            if member.safetensors_name == name:
                return member
        raise InvalidManifestError(f"dtype: got {name!r}, wanted one of {_dtype_names()}")


def _dtype_names() -> str:
    return ", ".join(member.name for member in DType)


@dataclass(frozen=True)
class ManifestLimits:
    """Bounds on a manifest that comes from outside."""

    max_tensors: int = 10_000
    max_payload_bytes: int = 16 * 2**30


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one tensor.

    Attributes:
        name: 1 to 256 bytes of UTF-8 without control characters.
        dtype: Element type.
        shape: At most 32 sizes, each >= 0; empty for a scalar. The product of the sizes that are
            not zero, times the element size, fits an int64: numpy counts that way even for empty
            tensors.

    Raises:
        InvalidManifestError: One of the above does not hold.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.shape) > MAX_RANK:
            raise InvalidManifestError(
                f"rank of {self.name!r}: got {len(self.shape)}, wanted <= {MAX_RANK}"
            )
        if min(self.shape, default=0) < 0:
            raise InvalidManifestError(f"shape of {self.name!r}: got {self.shape}, wanted all >= 0")
        if math.prod(size for size in self.shape if size) * self.dtype.itemsize > _MAX_INT64:
            raise InvalidManifestError(
                f"shape of {self.name!r}: got {self.shape}, wanted bytes within an int64"
            )

    @cached_property
    def element_count(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the tensor in the payload."""
        return self.element_count * self.dtype.itemsize


def _check_name(name: str) -> None:
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidManifestError(f"tensor name: got {name!r}, wanted valid Unicode") from None
    if not 1 <= size_bytes <= MAX_NAME_BYTES:
        raise InvalidManifestError(
            f"tensor name: got {size_bytes} bytes, wanted 1 to {MAX_NAME_BYTES}"
        )
    if not name.isprintable() and any(unicodedata.category(char) == "Cc" for char in name):
        raise InvalidManifestError(f"tensor name: got {name!r}, wanted no control characters")


@dataclass(frozen=True)
class Manifest:
    """The tensors of a payload, in the order of their bytes.

    Raises:
        InvalidManifestError: Two tensors share a name, or the payload's size exceeds an int64.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names: set[str] = set()
        for spec in self.tensors:
            if spec.name in names:
                raise InvalidManifestError(f"tensor name: got {spec.name!r} twice, wanted once")
            names.add(spec.name)
        if self.size_bytes > _MAX_INT64:
            raise InvalidManifestError(f"payload: got {self.size_bytes} bytes, wanted an int64")

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the payload: the sum over the tensors."""
        return sum(spec.size_bytes for spec in self.tensors)

    @property
    def chunk_count(self) -> int:
        """Number of chunks of the payload; 0 when it has no bytes."""
        return -(-self.size_bytes // CHUNK_BYTES)

    @cached_property
    def layout_digest(self) -> str:
        """Digest of the layout, not of the content: 64 lower-case hex digits.

        SHA-256 over the 16 bytes `qflare/v1/layout` (ASCII) followed, for each tensor in order, by:
        the length of its name in bytes (unsigned 32-bit), the name (UTF-8), the number of its
        element type in `qflare.v1.Dtype` (1 byte), its rank (unsigned 32-bit), and each size of its
        shape (unsigned 64-bit). Integers are big-endian.
        """
        digest = hashlib.sha256(_LAYOUT_DOMAIN)
        for spec in self.tensors:
            name = spec.name.encode()
            rank = len(spec.shape)
            digest.update(struct.pack(">I", len(name)) + name)
            digest.update(struct.pack(f">BI{rank}Q", spec.dtype, rank, *spec.shape))
        return digest.hexdigest()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Describe arrays, in the order of the mapping.

        Raises:
            InvalidManifestError: A name, dtype or shape cannot be in a manifest.
        """
        return cls(
            tuple(
                TensorSpec(name, DType.from_numpy(array.dtype), array.shape)
                for name, array in arrays.items()
            )
        )

    def to_proto(self) -> tensor_pb2.Manifest:
        """Return the wire form."""
        return tensor_pb2.Manifest(
            tensors=[
                tensor_pb2.TensorSpec(
                    name=spec.name,
                    dtype=tensor_pb2.Dtype.ValueType(spec.dtype),
                    shape=spec.shape,
                    size_bytes=spec.size_bytes,
                )
                for spec in self.tensors
            ],
            size_bytes=self.size_bytes,
            layout_digest=self.layout_digest,
        )

    @classmethod
    def from_proto(cls, message: tensor_pb2.Manifest, limits: ManifestLimits | None = None) -> Self:
        """Parse and validate the wire form.

        Args:
            message: The received message. Every stated size and the layout digest must be right.
            limits: Bounds; the defaults of `ManifestLimits` when not given.

        Raises:
            InvalidManifestError: A value is out of bounds or inconsistent.
        """
        limits = limits or ManifestLimits()
        _at_most("tensors", len(message.tensors), limits.max_tensors)
        manifest = cls(tuple(_spec_from_proto(spec) for spec in message.tensors))
        _at_most("payload bytes", manifest.size_bytes, limits.max_payload_bytes)
        _equal("size_bytes", message.size_bytes, manifest.size_bytes)
        _equal("layout_digest", message.layout_digest, manifest.layout_digest)
        return manifest


def _spec_from_proto(message: tensor_pb2.TensorSpec) -> TensorSpec:
    dtype = DType.from_number(message.dtype)
    spec = TensorSpec(message.name, dtype, tuple(message.shape))
    if message.size_bytes != spec.size_bytes:
        _equal(f"size_bytes of {spec.name!r}", message.size_bytes, spec.size_bytes)
    return spec


def _at_most(what: str, got: int, wanted: int) -> None:
    if got > wanted:
        raise InvalidManifestError(f"{what}: got {got}, wanted <= {wanted}")


def _equal(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise InvalidManifestError(f"{what}: got {got!r}, wanted {wanted!r}")
