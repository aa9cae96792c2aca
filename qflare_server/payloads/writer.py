"""Writing payloads of the coordinator's own: a version, a vector of its strategy, the form in which devices get it."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from qflare.crypto.sealed_payloads import SealContext
from qflare.tensors.download_encodings import download_manifest, narrowed
from qflare.tensors.encodings import Encoding
from qflare.tensors.manifest import CHUNK_BYTES, Manifest
from qflare_server.context import Context
from qflare_server.errors import InvalidUpdateError
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.payloads.reader import read_chunks
from qflare_server.payloads.sealed_receiver import receiver_of
from qflare_server.storage.payload_records import Download, ReceivedPayload, StoredPayload
from qflare_server.storage.repository import payloads


class PayloadWriter:
    """Writes a payload of the coordinator's own, from bytes of any cut; sealed, if it belongs to something."""

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        manifest: Manifest,
        at: datetime,
        belongs_to: SealContext | None = None,
    ) -> None:
        self._receiver = receiver_of(context, executor, ExpectedPayload(manifest), belongs_to)
        self._rest = bytearray()
        if self._receiver.is_large:
            payload_id = self._receiver.payload_id
            context.database.write(
                lambda session: payloads.begin_upload(session, payload_id=payload_id, at=at)
            )

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidUpdateError: An element is NaN or infinite, or there are too many bytes.
        """
        if not self._rest and len(data) == CHUNK_BYTES:
            self._receiver.add(self._receiver.next_index, data)
            return
        self._rest += data
        while len(self._rest) >= CHUNK_BYTES:
            self._receiver.add(self._receiver.next_index, bytes(self._rest[:CHUNK_BYTES]))
            del self._rest[:CHUNK_BYTES]

    def finish(self) -> ReceivedPayload:
        """Return the whole payload, durable if it is large."""
        if self._rest:
            self._receiver.add(self._receiver.next_index, bytes(self._rest))
            self._rest.clear()
        return self._receiver.finish()


class VersionWriter:
    """Writes the payload of a version and, chunk by chunk beside it, the form in which devices get it.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        manifest: Of the model.
        encoding: How devices get it; FULL_PRECISION writes nothing beside the payload.
        at: The time.
        belongs_to: What the payload is sealed for; None where it is not sealed.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        manifest: Manifest,
        encoding: Encoding,
        at: datetime,
        belongs_to: SealContext | None = None,
    ) -> None:
        self._context = context
        self._executor = executor
        self._manifest = manifest
        self._encoding = encoding
        self._at = at
        self._belongs_to = belongs_to

    def write(self, chunks: Iterable[bytes]) -> tuple[ReceivedPayload, Download | None]:
        """Write both.

        Raises:
            InvalidUpdateError: An element is NaN or infinite, or so in the form in which devices get it.
            InvalidPayloadError: What `chunks` raises.
        """
        writer = PayloadWriter(
            self._context, self._executor, self._manifest, self._at, self._belongs_to
        )

        def written() -> Iterator[bytes]:
            for chunk in chunks:
                writer.feed(chunk)
                yield chunk

        download = self.write_download(written())
        return writer.finish(), download

    def write_download(self, chunks: Iterable[bytes]) -> Download | None:
        """Write the form in which devices get a version whose payload's chunks are given; exhausts them.

        Raises:
            InvalidUpdateError: An element is beyond the range of the encoding.
        """
        if self._encoding is Encoding.FULL_PRECISION:
            for _ in chunks:
                pass
            return None
        layout = download_manifest(self._manifest, self._encoding)
        writer = PayloadWriter(self._context, self._executor, layout, self._at)
        for piece in narrowed(self._manifest, self._encoding, chunks):
            try:
                writer.feed(piece)
            except InvalidUpdateError as error:
                raise self._beyond(error) from error
        try:
            return Download(self._encoding, writer.finish())
        except InvalidUpdateError as error:
            raise self._beyond(error) from error

    def _beyond(self, error: InvalidUpdateError) -> InvalidUpdateError:
        return InvalidUpdateError(f"download as {self._encoding.name.lower()}: {error}")


def received_chunks(context: Context, received: ReceivedPayload) -> Iterator[bytes]:
    """Yield the chunks of a payload whose row is not written yet."""
    if received.data is not None:
        yield received.data
        return
    stored = StoredPayload(
        received.payload_id,
        received.size_bytes,
        received.digest,
        received.chunk_digests,
        in_row=False,
    )
    yield from read_chunks(context, stored)
