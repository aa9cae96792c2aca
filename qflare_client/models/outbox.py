"""Outbox: finished updates in the key store, kept until they are accepted or refused.

An update is stored before its first byte is sent, so that neither an outage of the coordinator nor a restart of the
device loses the result of a training. There is at most one per training session: the update of a later round replaces
it.

A file holds a secret (the payload key, protected like the keys of the device) and the payload, encrypted segment by
segment. The payload of a sealed update is stored as transmitted, under the same key. Any other payload is encrypted
under a key of its own, and decrypted while it is sent. Memory use is a few segments, whatever the size.

It does not send (see `qflare_client.models.submission`), or decide how long an update is kept; the coordinator's
response does.
"""

import base64
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Final

from google.protobuf.message import DecodeError

from qflare.crypto.sealed_payloads import (
    PLAINTEXT_BYTES,
    SEGMENT_BYTES,
    TAG_BYTES,
    Direction,
    PayloadKey,
    PayloadOpener,
    PayloadSealer,
    SealContext,
    sealed_size_bytes,
    segment_count,
)
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.symmetric import SECRET_BYTES, UnsealError
from qflare.tensors import CHUNK_BYTES, Manifest, ManifestLimits, rechunk
from qflare.v1 import security_pb2, tensor_pb2
from qflare_client.errors import KeyStoreError
from qflare_client.keystore.store import KeyStore
from qflare_client.models.sealed_update import SealedPayload, wrapped_for
from qflare_client.models.upload import Payload

_log = logging.getLogger(__name__)

_PREFIX: Final = "update-"
_ASSOCIATED: Final = b"qflare/v1/kept update"
_NO_LIMITS: Final = ManifestLimits(max_tensors=2**31, max_payload_bytes=2**62)
"""Limits for layouts that this device created itself."""


class DamagedUpdateError(KeyStoreError):
    """A kept update is damaged, or its file is missing."""


@dataclass(frozen=True)
class KeptUpdate:
    """An update that is waiting to be sent.

    Attributes:
        envelope: The signed statement.
        statement: The statement in the envelope.
        payload: The plaintext payload.
        sealed_payload: The sealed payload; None if the update is not sealed.
    """

    envelope: security_pb2.SignedEnvelope
    statement: security_pb2.UpdateStatement
    payload: "KeptPayload"
    sealed_payload: "KeptSegments | None"


@dataclass(frozen=True)
class _File:
    """A file of the outbox, read segment by segment and reopened for each pass."""

    store: KeyStore
    name: str
    key: PayloadKey = field(repr=False)
    size_bytes: int
    """Plaintext bytes."""

    def segments(self, first: int = 0) -> Iterator[bytes]:
        """Yield the encrypted segments from a given one on.

        Raises:
            DamagedUpdateError: The file is missing or unreadable.
        """
        try:
            found = self.store.open_bulk(self.name)
        except KeyStoreError as error:
            raise DamagedUpdateError(str(error)) from error
        if found is None:
            raise DamagedUpdateError(f"{self.store.home / self.name} is gone")
        _, file = found
        with file:
            file.seek(first * SEGMENT_BYTES, os.SEEK_CUR)
            for index in range(first, segment_count(self.size_bytes)):
                yield self._read(file, index)

    def _read(self, file: BinaryIO, index: int) -> bytes:
        length = min(PLAINTEXT_BYTES, self.size_bytes - index * PLAINTEXT_BYTES) + TAG_BYTES
        try:
            segment = file.read(length)
        except OSError as error:
            raise DamagedUpdateError(
                f"cannot read {self.store.home / self.name}: {error}"
            ) from error
        if len(segment) != length:
            raise DamagedUpdateError(f"{self.store.home / self.name} is damaged: it ends early")
        return segment

    def opened(self, first_byte: int) -> Iterator[bytes]:
        """Yield the plaintext in pieces, from a given byte on.

        Raises:
            DamagedUpdateError: The file is damaged.
        """
        first, skipped = divmod(first_byte, PLAINTEXT_BYTES)
        opener = PayloadOpener(self.key, self.size_bytes)
        for index, segment in enumerate(self.segments(first), first):
            try:
                piece = opener.open_segment(index, segment)
            except UnsealError as error:
                raise DamagedUpdateError(
                    f"{self.store.home / self.name} is damaged: {error}"
                ) from error
            yield piece[skipped:]
            skipped = 0


@dataclass(frozen=True)
class KeptPayload:
    """Plaintext payload of a kept update: an `OutgoingPayload` read from its file."""

    manifest: Manifest
    digest: str
    chunk_digests: bytes
    _file: _File

    @property
    def size_bytes(self) -> int:
        """Bytes of the payload."""
        return self._file.size_bytes

    @property
    def sealed(self) -> None:
        """None: the payload is not sealed."""

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the chunks from a given one on, in order.

        Raises:
            DamagedUpdateError: While iterating: the file is damaged or missing.
        """
        return rechunk(self._file.opened(first * CHUNK_BYTES))

    def pieces(self) -> Iterator[bytes]:
        """Return the bytes of all chunks in pieces of any size.

        Raises:
            DamagedUpdateError: While iterating: the file is damaged or missing.
        """
        return self._file.opened(0)


@dataclass(frozen=True)
class KeptSegments:
    """Segments of a kept sealed update: an `OutgoingPayload` read from its file."""

    manifest: Manifest
    chunk_digests: bytes
    sealed: security_pb2.SealedPayloadHeader
    size_bytes: int
    _file: _File

    @property
    def key(self) -> PayloadKey:
        """The key of the segments."""
        return self._file.key

    def addressed_to(self, recipient: KemPublicKey) -> "KeptSegments":
        """Return the same segments with their key wrapped for another key of the coordinator."""
        return replace(self, sealed=wrapped_for(self.key, recipient))

    def chunks_from(self, first: int) -> Iterator[bytes]:
        """Return the segments from a given one on, in order.

        Raises:
            DamagedUpdateError: While iterating: the file is damaged or missing.
        """
        return self._file.segments(first)


class Outbox:
    """The kept updates of a device. Thread-safe for different training sessions.

    Args:
        store: Key store of the device.

    Raises:
        KeyStoreError: The key store cannot be listed.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._names = set(store.names(_PREFIX))

    def keep(
        self,
        envelope: security_pb2.SignedEnvelope,
        payload: Payload | KeptPayload,
        sealed: SealedPayload | KeptSegments | None,
    ) -> None:
        """Store an update durably, replacing any other update of its training session.

        Args:
            envelope: Its signed statement.
            payload: The plaintext payload.
            sealed: The sealed payload; None if the update is not sealed.

        Raises:
            KeyStoreError: It cannot be written.
        """
        statement = security_pb2.UpdateStatement.FromString(envelope.payload)
        facts = {
            "envelope": _text(envelope.SerializeToString()),
            "manifest": _text(payload.manifest.to_proto().SerializeToString()),
            "chunk_digests": _text(payload.chunk_digests),
        }
        if sealed is None:
            sealer = PayloadSealer(_context(statement), payload.size_bytes)
            key, segments = sealer.key, sealer.seal(payload.pieces())
        else:
            key, segments = sealed.key, sealed.chunks_from(0)
            facts["sealed"] = _text(sealed.sealed.SerializeToString())
            facts["segment_digests"] = _text(sealed.chunk_digests)
        storage_key = os.urandom(SECRET_BYTES)
        facts["storage_key"] = _text(storage_key)
        facts["header"] = _text(key.header)
        facts["key"] = _text(key.store(storage_key, _ASSOCIATED))
        name = _name(statement.training_session_id)
        self._store.write_bulk(name, json.dumps(facts).encode(), segments)
        self._names.add(name)

    def find(self, training_session_id: str) -> KeptUpdate | None:
        """Return the kept update of a training session; None if there is no readable one."""
        name = _name(training_session_id)
        return self._load(name) if name in self._names else None

    def all(self) -> Iterator[KeptUpdate]:
        """Yield the kept updates of all training sessions."""
        for name in sorted(self._names):
            kept = self._load(name)
            if kept is not None:
                yield kept

    def forget(self, training_session_id: str) -> None:
        """Delete the kept update of a training session, if there is one.

        Raises:
            KeyStoreError: It cannot be deleted.
        """
        self._delete(_name(training_session_id))

    def _delete(self, name: str) -> None:
        if name in self._names:
            self._store.delete(name)
            self._names.discard(name)

    def _load(self, name: str) -> KeptUpdate | None:
        """Return a kept update; a damaged one is deleted with a warning."""
        try:
            found = self._store.open_bulk(name)
            if found is None:
                self._names.discard(name)
                return None
            secret, file = found
            file.close()
            return _decode(secret, self._store, name)
        except KeyStoreError as error:
            _log.warning("kept update dropped, it cannot be read: %s", error)
            self._delete(name)
            return None


def _context(statement: security_pb2.UpdateStatement) -> SealContext:
    return SealContext(
        statement.realm,
        Direction.STATE,
        statement.training_session_id,
        statement.round_number,
        statement.update_id,
        statement.device_id,
    )


def _decode(secret: bytes, store: KeyStore, name: str) -> KeptUpdate:
    try:
        facts = {key: base64.b64decode(value) for key, value in json.loads(secret).items()}
        envelope = security_pb2.SignedEnvelope.FromString(facts["envelope"])
        statement = security_pb2.UpdateStatement.FromString(envelope.payload)
        message = tensor_pb2.Manifest.FromString(facts["manifest"])
        manifest = Manifest.from_proto(message, _NO_LIMITS)
        key = PayloadKey.restore(facts["header"], facts["key"], facts["storage_key"], _ASSOCIATED)
        file = _File(store, name, key, manifest.size_bytes)
        payload = KeptPayload(manifest, statement.payload_digest, facts["chunk_digests"], file)
        if "sealed" not in facts:
            return KeptUpdate(envelope, statement, payload, None)
        sealed = security_pb2.SealedPayloadHeader.FromString(facts["sealed"])
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        DecodeError,
    ) as error:
        raise DamagedUpdateError(f"{store.home / name} is damaged: {error!r}") from error
    size_bytes = sealed_size_bytes(manifest.size_bytes)
    digests = facts.get("segment_digests", b"")
    segments = KeptSegments(manifest, digests, sealed, size_bytes, file)
    return KeptUpdate(envelope, statement, payload, segments)


def _name(training_session_id: str) -> str:
    """Return the file name of a training session; text from the coordinator never becomes a path."""
    return _PREFIX + hashlib.sha256(training_session_id.encode()).hexdigest()[:32]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
