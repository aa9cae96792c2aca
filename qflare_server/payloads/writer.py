"""Writers of the coordinator's own payloads: versions, vectors of strategies, downloads in a smaller encoding."""

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
from qflare_server.storage.repository import payloads as rows


class PayloadWriter:
    """Writes a payload from pieces of any size; seals it if a context is given."""

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        manifest: Manifest,
        at: datetime,
        seal_context: SealContext | None = None,
    ) -> None:
        self._context = context
        self._receiver = receiver_of(context, executor, ExpectedPayload(manifest), seal_context)
        self._rest = bytearray()
        if self._receiver.is_large:
            self._receiver.begin(at)

    def feed(self, data: bytes) -> None:
        """Add the next bytes.

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
        """Return the payload; a large one is durable."""
        if self._rest:
            self._receiver.add(self._receiver.next_index, bytes(self._rest))
            self._rest.clear()
        return self._receiver.finish()

    def abandon(self) -> None:
        """Give up the payload, finished or not: its chunks are left to be swept."""
        self._receiver.abandon()
        if self._receiver.is_large:
            abandoned = [self._receiver.chunks]
            self._context.database.write(lambda session: rows.give_up_uploads(session, abandoned))


class VersionWriter:
    """Writes the payload of a version and, in the same pass, the one that devices download.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        manifest: Layout of the model.
        encoding: Encoding of the download; with FULL_PRECISION devices download the payload itself.
        at: Time of creation.
        seal_context: Context that the payload is sealed for; None if it is not sealed.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        manifest: Manifest,
        encoding: Encoding,
        at: datetime,
        seal_context: SealContext | None = None,
    ) -> None:
        self._context = context
        self._executor = executor
        self._manifest = manifest
        self._encoding = encoding
        self._at = at
        self._seal_context = seal_context

    def write(self, chunks: Iterable[bytes]) -> tuple[ReceivedPayload, Download | None]:
        """Write both payloads.

        Raises:
            InvalidUpdateError: An element is NaN or infinite, or becomes so in the encoding of the download.
            InvalidPayloadError: Raised by `chunks`.
        """
        writer = PayloadWriter(
            self._context, self._executor, self._manifest, self._at, self._seal_context
        )

        def written() -> Iterator[bytes]:
            for chunk in chunks:
                writer.feed(chunk)
                yield chunk

        download = self.write_download(written())
        return writer.finish(), download

    def write_download(self, chunks: Iterable[bytes]) -> Download | None:
        """Write the payload that devices download, from the chunks of a version's payload; consumes them.

        Raises:
            InvalidUpdateError: An element is out of the encoding's range.
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
    """Yield the chunks of a payload that has no row yet."""
    if received.data is not None:
        yield received.data
        return
    stored = StoredPayload(
        received.payload_id,
        received.size_bytes,
        received.digest,
        received.chunk_digests,
        in_row=False,
        chunks=received.chunks,
    )
    yield from read_chunks(context, stored)
