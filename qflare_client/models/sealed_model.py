"""Streaming decryption of sealed versions.

It does not verify the statement (see `trust.keyset`) or the transmitted bytes (see `qflare_client.models.download`).
"""

import hashlib
import hmac

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import PayloadKey, PayloadOpener, SealContext
from qflare.crypto.sealing import KemKey, UnsealError
from qflare.tensors import PieceHasher
from qflare.v1 import security_pb2
from qflare_client.errors import CorruptModelError


class ModelOpener:
    """Decrypts a sealed version while it is received.

    Args:
        sealed: Header and wrapped key, as received.
        statement: The version's verified statement.
        key: The device's KEM key.

    Raises:
        CorruptModelError: The header does not match the statement, or this device cannot decrypt the version.
    """

    def __init__(
        self,
        sealed: security_pb2.SealedPayloadHeader,
        statement: security_pb2.ModelStatement,
        key: KemKey,
    ) -> None:
        if hashlib.sha256(sealed.header).hexdigest() != statement.sealed_header_digest:
            raise CorruptModelError(
                "the header of the sealed version is not the one that was signed"
            )
        recipients = [wrapped.recipient_key_id for wrapped in sealed.wrapped_keys]
        if recipients != [key.public.key_id]:
            raise CorruptModelError("the version is not sealed for this device's current key")
        context = SealContext.from_model(statement)
        try:
            payload_key = PayloadKey.unwrap(
                sealed.header, sealed.wrapped_keys[0], context, key.decapsulate
            )
            self._opener = PayloadOpener(payload_key, statement.size_bytes)
        except UnsealError as error:
            raise CorruptModelError(f"sealed version: {error}") from error
        self._content = PieceHasher()
        self._digest = statement.payload_digest

    def open(self, index: int, segment: bytes) -> bytes:
        """Decrypt the next segment; call this in segment order.

        Raises:
            CorruptModelError: Decryption fails.
        """
        try:
            content = self._opener.open_segment(index, segment)
        except UnsealError as error:
            raise CorruptModelError(f"sealed version: {error}") from error
        self._content.feed(content)
        return content

    def finish(self) -> None:
        """Check the plaintext digest after the last segment.

        Raises:
            CorruptModelError: It does not match the statement.
        """
        digest = merkle.root(self._content.finish()).hex()
        if not hmac.compare_digest(digest, self._digest):
            raise CorruptModelError("the version's plaintext does not match its statement")
