"""Arrays of a device that belong to an update: they take effect when the update is accepted, and not otherwise.

The arrays are written to the key store before their update is sent (`stage`), and replace the earlier ones when it is
accepted (`commit`). If a crash or an outage leaves open whether it was, the device asks the coordinator (`settle`).

Layout of a file: length of the facts (4 bytes, big endian), the facts as JSON, the payload (docs/protocol.md, section
on payloads), SHA-256 of all before. The key store protects the file like the keys.
"""

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from qflare.tensors import Array, Manifest, assemble, chunks
from qflare.v1 import tensor_pb2
from qflare_client.errors import KeyStoreError

_log = logging.getLogger(__name__)

_LENGTH: Final = struct.Struct(">I")
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_PENDING: Final = ".pending"


class SecretFiles(Protocol):
    """Files by name that hold secrets; a `KeyStore` is one."""

    def read_secret(self, name: str, /) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def write_secret(self, name: str, secret: bytes, /) -> None:
        """Write a file, replacing it at once."""

    def rename(self, name: str, following: str, /) -> None:
        """Give a file another name, replacing a file of that name."""

    def delete(self, name: str, /) -> None:
        """Delete a file if it exists."""


class StagedArrays:
    """One kind of arrays of a device, by training session.

    Args:
        store: Key store of the device, or files in its place.
        kind: Kind of arrays, the beginning of the files' names.
        is_accepted: Returns whether the coordinator has accepted an update, given by its id.
    """

    def __init__(self, store: SecretFiles, kind: str, is_accepted: Callable[[str], bool]) -> None:
        self._store = store
        self._kind = kind
        self._is_accepted = is_accepted

    def read(self, training_session_id: str, layout: Manifest | None = None) -> dict[str, Array]:
        """Return the arrays that are in effect; empty if there are none.

        Args:
            training_session_id: Training session.
            layout: The layout that the arrays must have; None for any. Arrays of another layout are dropped, as are
                damaged ones, with a warning.
        """
        data = self._load(self._name(training_session_id))
        if data is None:
            return {}
        facts = _facts(data)
        stored = _layout(facts, layout)
        if facts.get("training_session_id") != training_session_id or stored is None:
            _log.warning("%s arrays dropped: damaged or of another layout", self._kind)
            return {}
        return assemble(stored, [memoryview(data)[_payload_start(data) : -_DIGEST_BYTES]])

    def stage(self, training_session_id: str, update_id: str, arrays: Mapping[str, Array]) -> None:
        """Write arrays that take effect when an update is accepted; call this before sending the update.

        Raises:
            KeyStoreError: They cannot be written.
        """
        data = _encode(training_session_id, update_id, arrays)
        self._store.write_secret(self._name(training_session_id) + _PENDING, data)

    def commit(self, training_session_id: str) -> bool:
        """Put the staged arrays, if any, into effect, and return whether there were any.

        Raises:
            KeyStoreError: They cannot be renamed.
        """
        name = self._name(training_session_id)
        if self._load(name + _PENDING) is None:
            return False
        self._store.rename(name + _PENDING, name)
        return True

    def settle(self, training_session_id: str) -> bool:
        """Determine whether an update without a receipt was accepted; return whether its arrays took effect.

        Raises:
            QflareClientError: It is unknown, and the coordinator is unreachable.
            KeyStoreError: The arrays cannot be renamed.
        """
        name = self._name(training_session_id) + _PENDING
        data = self._load(name)
        if data is None:
            return False
        facts = _facts(data)
        is_ours = facts.get("training_session_id") == training_session_id
        if is_ours and self._is_accepted(facts["update_id"]):
            return self.commit(training_session_id)
        self._store.delete(name)
        return False

    def forget(self, training_session_id: str) -> None:
        """Delete the arrays of a training session."""
        name = self._name(training_session_id)
        self._store.delete(name + _PENDING)
        self._store.delete(name)

    def _name(self, training_session_id: str) -> str:
        """Return the name of a file; text from the coordinator never becomes a path."""
        return f"{self._kind}-" + hashlib.sha256(training_session_id.encode()).hexdigest()[:32]

    def _load(self, name: str) -> bytes | None:
        try:
            return self._store.read_secret(name)
        except KeyStoreError as error:
            _log.warning("%s arrays dropped, they cannot be read: %s", self._kind, error)
            return None


def _encode(training_session_id: str, update_id: str, arrays: Mapping[str, Array]) -> bytes:
    """Return the bytes of a file."""
    manifest = Manifest.from_arrays(arrays)
    facts = {
        "training_session_id": training_session_id,
        "update_id": update_id,
        "manifest": manifest.to_proto().SerializeToString(deterministic=True).hex(),
    }
    header = json.dumps(facts).encode()
    body = bytearray(_LENGTH.pack(len(header)) + header)
    for chunk in chunks(arrays, manifest):
        body += chunk
    body += hashlib.sha256(body).digest()
    return bytes(body)


def _facts(data: bytes) -> dict[str, str]:
    """Return the facts of a file; empty if it is damaged."""
    view = memoryview(data)
    if hashlib.sha256(view[:-_DIGEST_BYTES]).digest() != view[-_DIGEST_BYTES:]:
        return {}
    facts: dict[str, str] = json.loads(data[_LENGTH.size : _payload_start(data)])
    return facts


def _layout(facts: Mapping[str, str], wanted: Manifest | None) -> Manifest | None:
    """Return the layout of a file's arrays; None if it is unknown or not the wanted one."""
    if "manifest" not in facts:  # a residual of an earlier release, which states the digest only
        known = wanted is not None and facts.get("layout_digest") == wanted.layout_digest
        return wanted if known else None
    message = tensor_pb2.Manifest.FromString(bytes.fromhex(facts["manifest"]))
    stored = Manifest.from_proto(message)
    return stored if wanted is None or stored.layout_digest == wanted.layout_digest else None


def _payload_start(data: bytes) -> int:
    (length,) = _LENGTH.unpack_from(data)
    return int(_LENGTH.size + length)
