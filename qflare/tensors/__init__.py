"""Tensors as bytes: manifests, payloads and encodings.

    manifest = Manifest.from_arrays(arrays)
    digest = payload_digest(chunks(arrays, manifest))
    assert assemble(manifest, chunks(arrays, manifest)).keys() == arrays.keys()

`qflare.tensors.manifest` says which tensors a payload holds and in which order, `qflare.tensors.payload` makes
its bytes and makes arrays of them, `qflare.tensors.elements` checks them. Nothing is defined here.
"""

from qflare.tensors.elements import (
    BytesLike,
    ElementRule,
    FiniteCheck,
    InvalidPayloadError,
    NonFiniteError,
    PayloadSizeError,
    check_elements,
)
from qflare.tensors.manifest import (
    CHUNK_BYTES,
    Array,
    DType,
    InvalidManifestError,
    Manifest,
    ManifestLimits,
    TensorSpec,
)
from qflare.tensors.payload import (
    PayloadHasher,
    PieceHasher,
    assemble,
    check_arrays,
    chunk_views,
    chunks,
    payload_digest,
    pieces,
    rechunk,
    split,
)

__all__ = [
    "CHUNK_BYTES",
    "Array",
    "BytesLike",
    "DType",
    "ElementRule",
    "FiniteCheck",
    "InvalidManifestError",
    "InvalidPayloadError",
    "Manifest",
    "ManifestLimits",
    "NonFiniteError",
    "PayloadHasher",
    "PayloadSizeError",
    "PieceHasher",
    "TensorSpec",
    "assemble",
    "check_arrays",
    "check_elements",
    "chunk_views",
    "chunks",
    "payload_digest",
    "pieces",
    "rechunk",
    "split",
]
