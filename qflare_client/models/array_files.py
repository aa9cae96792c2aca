"""Files of arrays in the key store: facts about them, their payload, and a SHA-256 over both.

Layout: length of the facts (4 bytes, big endian), the facts as JSON, the payload (docs/protocol.md, section
on payloads), SHA-256 of all before. The key store protects the file like the keys.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Final

from qflare.tensors import Array, Manifest, assemble, chunks

_LENGTH: Final = struct.Struct(">I")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


def encode(facts: Mapping[str, str], arrays: Mapping[str, Array]) -> bytes:
    """Return the bytes of a file.

    Args:
        facts: About the arrays; texts by name.
        arrays: Arrays by name, of any of the element types of payloads.
    """
    header = json.dumps(dict(facts)).encode()
    body = bytearray(_LENGTH.pack(len(header)) + header)
    for chunk in chunks(arrays, Manifest.from_arrays(arrays)):
        body += chunk
    body += hashlib.sha256(body).digest()
    return bytes(body)


def facts_of(data: bytes) -> dict[str, str]:
    """Return the facts of a file; empty if it is damaged."""
    view = memoryview(data)
    if hashlib.sha256(view[:-_DIGEST_BYTES]).digest() != view[-_DIGEST_BYTES:]:
        return {}
    facts: dict[str, str] = json.loads(data[_LENGTH.size : _payload_start(data)])
    return facts


def arrays_of(data: bytes, layout: Manifest) -> dict[str, Array]:
    """Return the arrays of an undamaged file whose layout is known."""
    return assemble(layout, [memoryview(data)[_payload_start(data) : -_DIGEST_BYTES]])


def _payload_start(data: bytes) -> int:
    (length,) = _LENGTH.unpack_from(data)
    return int(_LENGTH.size + length)
