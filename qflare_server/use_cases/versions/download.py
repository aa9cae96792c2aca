"""Model downloads, streamed in bounded memory.

Chunks of versions requested by many devices at once are kept in a small cache, so that a hundred downloads of one
version read it once.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import InvalidKeyError
from qflare.tensors import CHUNK_BYTES
from qflare.tensors.encodings import Encoding
from qflare.v1 import security_pb2
from qflare_server.context import Context, UnprovenKeyError
from qflare_server.errors import (
    GlobalModelNotFoundError,
    InvalidRequestError,
    NoKemKeyError,
    TooManyRequestsError,
    TrainingSessionNotFoundError,
    UpdateNotFoundError,
)
from qflare_server.payloads.keys import wrap_key
from qflare_server.payloads.reader import Contents, read_range, rechunk_after
from qflare_server.storage.payload_records import StoredPayload, describe
from qflare_server.storage.payload_store import READ_CHUNKS
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import (
    audit,
    devices,
    global_models,
    training_sessions,
    updates,
)
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel, UpdateState

MAX_LINKS = 1000
MAX_LINK_BYTES: Final = 2**19
"""Maximum bytes of statements in a header, besides layout and digests of up to `MAX_DESCRIPTION_BYTES`."""
CACHE_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Delivery:
    """A version prepared for download."""

    model: GlobalModel
    payload: StoredPayload
    encoding: Encoding
    """How the floating tensors in the payload are encoded."""
    links: Sequence[tuple[bytes, bytes]]
    """Statement and signature of each version between the known one and this."""


@dataclass(frozen=True)
class ContributionProof:
    """Path from an update to its version's contributors digest."""

    model: GlobalModel
    leaf_index: int
    tree_size: int
    siblings: Sequence[bytes]


MAX_CACHED_BATCHES: Final = 64


class _ChunkCache:
    """LRU cache of chunk batches, bounded in bytes and number; thread-safe.

    The bound on the number matters for small models: each batch costs more memory than its bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._batches: OrderedDict[tuple[str, int], list[bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> list[bytes] | None:
        with self._lock:
            batch = self._batches.get(key)
            if batch is not None:
                self._batches.move_to_end(key)
            return batch

    def put(self, key: tuple[str, int], batch: list[bytes]) -> None:
        with self._lock:
            if key in self._batches:
                return
            self._batches[key] = batch
            self._bytes += sum(map(len, batch))
            while self._batches and (
                self._bytes > self._limit_bytes or len(self._batches) > MAX_CACHED_BATCHES
            ):
                _, dropped = self._batches.popitem(last=False)
                self._bytes -= sum(map(len, dropped))


def _check_first(first_chunk: int, chunk_count: int) -> None:
    if not 0 <= first_chunk <= chunk_count:
        raise InvalidRequestError(
            f"first_chunk: got {first_chunk}, want 0 to {chunk_count}", field="first_chunk"
        )


class Deliveries:
    """Model download use cases."""

    def __init__(self, context: Context, executor: ThreadPoolExecutor) -> None:
        self._context = context
        self._executor = executor
        self._cache = _ChunkCache(CACHE_BYTES)
        self._places = threading.BoundedSemaphore(context.config.max_downloads)

    def find(
        self,
        training_session_id: str,
        version: int | None = None,
        *,
        released: bool = False,
        known_version: int | None = None,
        encoding: int = Encoding.FULL_PRECISION,
    ) -> Delivery:
        """Return a version: the one asked for, the latest, or the latest released.

        Args:
            training_session_id: Training session.
            version: Version; None means the latest.
            released: Without a version: the latest released one.
            known_version: Version the caller knows; statements of the later ones are included.
            encoding: Number of `qflare.v1.Encoding` for floating tensors, 0 for full precision.

        Raises:
            InvalidRequestError: The version is not available in that encoding.
            TrainingSessionNotFoundError: There is no such training session.
            GlobalModelNotFoundError: There is no such version.
            PayloadPrunedError: Its payload has been pruned.
        """
        form = encoding or Encoding.FULL_PRECISION
        with self._context.database.read() as session:
            found = global_models.find_served(
                session,
                training_session_id,
                version,
                released=released,
                encoded=form != Encoding.FULL_PRECISION,
            )
            if found is None:
                raise TrainingSessionNotFoundError
            wanted, model, payload = found
            if model is None:
                raise GlobalModelNotFoundError(f"no version {wanted}")
            _require_encoding(model, form)
            links: Sequence[tuple[bytes, bytes]] = ()
            if known_version is not None and known_version < model.version - 1:
                links = global_models.statements(
                    session,
                    model.training_session_id,
                    known_version + 1,
                    model.version - 1,
                    MAX_LINKS,
                    MAX_LINK_BYTES,
                )
            return Delivery(model, describe(payload), Encoding(form), links)

    def wrapped_for(
        self, delivery: Delivery, device_id: str | None
    ) -> security_pb2.SealedPayloadHeader | None:
        """Return the wrapped key of a sealed version for a device; None if the version is not sealed.

        Args:
            delivery: The version.
            device_id: The calling device; None for other callers.

        Raises:
            NoKemKeyError: The caller has no KEM key.
            SealedPayloadLostError: The version's key does not open.
        """
        payload = delivery.payload
        if payload.seal is None:
            return None
        if device_id is None:
            raise NoKemKeyError("sealed: administrators get it by DownloadGlobalModel")
        with self._context.database.read() as session:
            device = devices.get_device(session, device_id)
            kem_public_key = None if device is None else device.kem_public_key
        self._require_own(device_id, kem_public_key)
        return wrap_key(self._context, payload.payload_id, payload.seal, kem_public_key)

    def _require_own(self, device_id: str, kem_public_key: bytes | None) -> None:
        """Check that signed evidence binds a KEM key to a device before anything is sealed to it."""
        if kem_public_key is None:
            raise NoKemKeyError
        try:
            self._context.identities.require(device_id, KemPublicKey(kem_public_key).key_id)
        except UnprovenKeyError as error:
            raise NoKemKeyError("nothing shows that the KEM key is the device's") from error
        except InvalidKeyError as error:
            raise NoKemKeyError("the device's KEM key is not usable") from error

    def opened(
        self, caller: Caller, delivery: Delivery, first_chunk: int
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the plaintext chunks of a version for an administrator; opening a sealed version is audited.

        Raises:
            TooManyRequestsError: Too many large downloads are under way.
            InvalidRequestError: The version has no such chunk.
            SealedPayloadLostError: The sealed payload does not open.
        """
        if delivery.payload.seal is None:
            return self.chunks(delivery, first_chunk)
        chunk_count = -(-delivery.model.size_bytes // CHUNK_BYTES)
        _check_first(first_chunk, chunk_count)
        self._record_opening(caller, delivery.model)
        return self._opened(delivery.payload, first_chunk)

    def _opened(self, payload: StoredPayload, first_chunk: int) -> Iterator[tuple[int, bytes]]:
        contents = Contents(self._context, payload)
        first, skipped_bytes = divmod(first_chunk * CHUNK_BYTES, contents.piece_bytes)
        if first >= contents.piece_count:
            return iter(())
        kept = (data for _, data in self._chunks(payload, first))
        return enumerate(rechunk_after(contents.open(kept, first), skipped_bytes), first_chunk)

    def _record_opening(self, caller: Caller, model: GlobalModel) -> None:
        event = Event(
            "model.opened",
            f"training_session:{model.training_session_id}",
            RiskLevel.MEDIUM,
            {"version": model.version, "digest": model.digest},
        )
        at = self._context.clock()
        self._context.database.write(lambda session: audit.record(session, caller, event, at))

    def chunks(self, delivery: Delivery, first_chunk: int) -> Iterator[tuple[int, bytes]]:
        """Yield indices and bytes of a version's chunks as stored, starting at `first_chunk`.

        Raises:
            TooManyRequestsError: Too many large downloads are under way.
            InvalidRequestError: The version has no such chunk.
        """
        _check_first(first_chunk, delivery.payload.chunk_count)
        return self._chunks(delivery.payload, first_chunk)

    def _chunks(self, payload: StoredPayload, first_chunk: int) -> Iterator[tuple[int, bytes]]:
        if payload.in_row:
            yield from self._from(payload, first_chunk)
            return
        if not self._places.acquire(blocking=False):
            raise TooManyRequestsError("too many large downloads at once", retry_after_s=0.2)
        try:
            yield from self._from(payload, first_chunk)
        finally:
            self._places.release()

    def _from(self, payload: StoredPayload, first_chunk: int) -> Iterator[tuple[int, bytes]]:
        """Yield the chunks; the next batch is read while this one is sent."""
        first_batch = first_chunk - first_chunk % READ_CHUNKS
        starts = range(first_batch, payload.chunk_count, READ_CHUNKS)
        ahead: Future[list[bytes]] | None = None
        for start in starts:
            batch = self._batch(payload, start) if ahead is None else ahead.result()
            following = start + READ_CHUNKS
            ahead = None
            if following in starts:
                ahead = self._executor.submit(self._batch, payload, following)
            for index, chunk in enumerate(batch, start):
                if index >= first_chunk:
                    self._context.telemetry.bytes_sent(len(chunk))
                    yield index, chunk

    def _batch(self, payload: StoredPayload, start: int) -> list[bytes]:
        key = (payload.payload_id, start)
        batch = self._cache.get(key)
        if batch is None:
            batch = read_range(self._context, payload, start, READ_CHUNKS)
            self._cache.put(key, batch)
        return batch

    def lineage(
        self, training_session_id: str, first: int, last: int | None
    ) -> Sequence[tuple[bytes, bytes]]:
        """Return statements and signatures of consecutive versions, at most 1,000."""
        with self._context.database.read() as session:
            training_session = training_sessions.get_session(session, training_session_id)
            if training_session is None:
                raise TrainingSessionNotFoundError
            end = training_session.current_version if last is None else last
            return global_models.statements(
                session, training_session.id, max(first, 0), end, MAX_LINKS
            )

    def contribution_proof(self, update_id: str) -> ContributionProof:
        """Return the proof that an update is in its version.

        Raises:
            UpdateNotFoundError: There is no such update, or it is in no version yet.
        """
        with self._context.database.read() as session:
            update = updates.get_update(session, update_id)
            if update is None or update.state != UpdateState.AGGREGATED.value:
                raise UpdateNotFoundError
            assert update.aggregated_version is not None
            return self._prove(
                session,
                update.training_session_id,
                update.aggregated_version,
                update.statement_digest,
            )

    def _prove(
        self, session: Session, training_session_id: str, version: int, digest: str
    ) -> ContributionProof:
        model = global_models.get_model(session, training_session_id, version)
        assert model is not None
        digests = sorted(updates.contributors(session, training_session_id, version))
        leaves = [merkle.leaf_hash(bytes.fromhex(text)) for text in digests]
        index = digests.index(digest)
        siblings = merkle.inclusion_proof(merkle.nodes_of(leaves), index, len(leaves))
        return ContributionProof(model, index, len(leaves), siblings)


def _require_encoding(model: GlobalModel, encoding: int) -> None:
    """Refuse an encoding other than full precision and the version's download encoding."""
    if encoding not in {Encoding.FULL_PRECISION, model.download_encoding}:
        wanted = Encoding(model.download_encoding or Encoding.FULL_PRECISION).name
        raise InvalidRequestError(
            f"encoding: got number {encoding}, want {wanted} or FULL_PRECISION", field="encoding"
        )
