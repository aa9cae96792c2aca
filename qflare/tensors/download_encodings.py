"""Reduced-precision model downloads: floating tensors are rounded for the download and widened by the device.

Devices may get a version with its floating tensors as float16 or bfloat16. The smaller payload is made once, when
the version is published; its layout is `wire_manifest` of the model's, its digest is in the version's statement.
Both directions stream and hold at most one piece beyond the caller's data.

Invariants: rounding is to nearest, ties to even, and tensors of 16 bits or less stay as they are; the same payload
gives the same bytes wherever it is cut; `widened` gives the element types of the model, and every value exactly as
it traveled.

This module does not check elements. A value beyond the range of the smaller type becomes infinite, which
`FiniteCheck` of the smaller payload finds.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from qflare.tensors.elements import BytesLike
from qflare.tensors.encodings import Encoding, narrow, wire_manifest
from qflare.tensors.manifest import DType, InvalidManifestError, Manifest
from qflare.tensors.payload import rechunk, split

DOWNLOAD_ENCODINGS: Final[frozenset[int]] = frozenset({Encoding.FLOAT16, Encoding.BFLOAT16})
"""The encodings that a download may have beside full precision."""


def download_manifest(base: Manifest, encoding: Encoding) -> Manifest:
    """Return the manifest of a download payload.

    Args:
        base: The manifest of the model.
        encoding: FULL_PRECISION, FLOAT16 or BFLOAT16.

    Raises:
        InvalidManifestError: The encoding is not a download encoding.
    """
    if encoding is not Encoding.FULL_PRECISION and encoding not in DOWNLOAD_ENCODINGS:
        raise InvalidManifestError(
            f"download encoding: got {encoding.name}, wanted FULL_PRECISION, FLOAT16 or BFLOAT16"
        )
    return wire_manifest(base, encoding)


def narrowed(base: Manifest, encoding: Encoding, pieces: Iterable[BytesLike]) -> Iterator[bytes]:
    """Make the smaller payload of a version.

    Args:
        base: The manifest of the model.
        encoding: As for `download_manifest`.
        pieces: The model's payload in pieces of any size.

    Returns:
        The chunks of the smaller payload.

    Raises:
        InvalidManifestError: On the call itself: the encoding is not a download encoding.
        PayloadSizeError: Too few or too many bytes.
    """
    return rechunk(_converted(base, download_manifest(base, encoding), pieces))


def widened(base: Manifest, encoding: Encoding, pieces: Iterable[BytesLike]) -> Iterator[BytesLike]:
    """Read the smaller payload of a version back into the element types of the model.

    Args:
        base: The manifest of the model.
        encoding: As for `download_manifest`.
        pieces: The smaller payload in pieces of any size.

    Returns:
        Bytes of a payload of the base manifest, in pieces of any size.

    Raises:
        InvalidManifestError: On the call itself: the encoding is not a download encoding.
        PayloadSizeError: Too few or too many bytes.
    """
    return _converted(download_manifest(base, encoding), base, pieces)


def _converted(
    source: Manifest, target: Manifest, pieces: Iterable[BytesLike]
) -> Iterator[BytesLike]:
    """Convert the elements of each tensor; a piece may end within an element."""
    wanted = {spec.name: spec.dtype for spec in target.tensors}
    rest = b""
    for spec, _, piece in split(source, pieces):
        if wanted[spec.name] is spec.dtype:
            yield piece
            continue
        data = rest + piece if rest else piece
        whole = len(data) - len(data) % spec.dtype.itemsize
        rest = bytes(data[whole:])
        if whole:
            yield _elements(data[:whole], spec.dtype, wanted[spec.name])


def _elements(data: BytesLike, source: DType, target: DType) -> memoryview:
    values = np.frombuffer(data, source.numpy)
    return np.ascontiguousarray(narrow(values, target)).view(np.uint8).data
