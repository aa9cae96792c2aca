"""Content keys of sealed payloads: unwrapped from a device's header, encrypted for storage, wrapped for a device.

A stored content key is encrypted under a storage key, which is derived from the state key that replicas share and that
no database holds. Payloads therefore stay readable when a session KEM key is retired, and neither a copy of the
database nor the key file alone opens them. A stored content key begins with the name of its storage key; after the
state key was replaced, keys under earlier state keys still open, and `rewrap` re-encrypts them under the current one.
"""

from functools import partial
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto.sealed_payloads import PayloadKey, SealContext
from qflare.crypto.sealing import KemPublicKey, UnsealError
from qflare.crypto.signing import InvalidKeyError
from qflare.crypto.symmetric import hkdf_expand
from qflare.v1 import security_pb2
from qflare_server.context import Context, UnknownKeyError
from qflare_server.errors import (
    InvalidSealError,
    NoKemKeyError,
    SealedPayloadLostError,
    SealKeyNotAcceptedError,
)
from qflare_server.storage.payload_records import Seal
from qflare_server.storage.repository import payloads

NAME_BYTES: Final = 8
REWRAP_BATCH: Final = 200
_KEY_INFO: Final = b"qflare/v1/payload storage key"
_NAME_INFO: Final = b"qflare/v1/payload storage key name"
_ASSOCIATED: Final = b"qflare/v1/key of payload "


def take_key(
    context: Context, message: security_pb2.SealedPayloadHeader, seal_context: SealContext
) -> PayloadKey:
    """Unwrap the content key of a payload that a device sealed to the coordinator.

    Raises:
        InvalidSealError: Header or wrapped key belong to another context, or were modified.
        SealKeyNotAcceptedError: The payload is sealed to a key that is unknown or no longer accepted.
    """
    if context.decapsulate is None:
        raise SealKeyNotAcceptedError
    wrapped = message.wrapped_keys[0]
    decapsulate = partial(context.decapsulate, wrapped.recipient_key_id)
    try:
        return PayloadKey.unwrap(message.header, wrapped, seal_context, decapsulate)
    except UnknownKeyError as error:
        raise SealKeyNotAcceptedError(
            f"sealed: key {wrapped.recipient_key_id[:64]} is not in the keyset"
        ) from error
    except UnsealError as error:
        raise InvalidSealError(f"sealed: {error}", field="header.sealed") from error


def wrap_key(
    context: Context, payload_id: str, seal: Seal, kem_public_key: bytes | None
) -> security_pb2.SealedPayloadHeader:
    """Return header and wrapped content key with which a device opens a stored payload.

    Raises:
        NoKemKeyError: The device has no KEM key.
        SealedPayloadLostError: The stored content key cannot be decrypted.
    """
    if kem_public_key is None:
        raise NoKemKeyError
    key = restore_key(context, payload_id, seal)
    try:
        wrapped = key.wrap(KemPublicKey(kem_public_key))
    except (InvalidKeyError, UnsealError) as error:
        raise NoKemKeyError("the device's KEM key is not usable") from error
    return security_pb2.SealedPayloadHeader(header=seal.header, wrapped_keys=[wrapped])


def store_key(context: Context, payload_id: str, key: PayloadKey) -> bytes:
    """Return a content key encrypted for storage."""
    return _store(_current(context), payload_id, key)


def restore_key(context: Context, payload_id: str, seal: Seal) -> PayloadKey:
    """Decrypt the content key of a stored payload.

    Raises:
        SealedPayloadLostError: No known state key decrypts it.
    """
    name, stored = seal.stored_key[:NAME_BYTES], seal.stored_key[NAME_BYTES:]
    for state_key in (_current(context), *context.earlier_state_keys):
        if hkdf_expand(state_key, _NAME_INFO, NAME_BYTES) != name:
            continue
        try:
            return PayloadKey.restore(
                seal.header, stored, hkdf_expand(state_key, _KEY_INFO), _associated(payload_id)
            )
        except UnsealError as error:
            raise SealedPayloadLostError(f"payload {payload_id}: {error}") from error
    raise SealedPayloadLostError(
        f"payload {payload_id}: its key is encrypted under an unknown state key"
    )


def rewrap(context: Context) -> int:
    """Re-encrypt stored content keys that are under an earlier state key, in batches.

    Returns:
        Number of re-encrypted keys; keys that cannot be decrypted are left unchanged.
    """
    if not context.earlier_state_keys:
        return 0
    state_key = _current(context)
    name = hkdf_expand(state_key, _NAME_INFO, NAME_BYTES)

    def work(session: Session) -> int:
        moved = 0
        for payload_id, header, stored_key in payloads.keys_under_others(
            session, name, REWRAP_BATCH
        ):
            try:
                key = restore_key(context, payload_id, Seal(header, stored_key))
            except SealedPayloadLostError:
                continue
            payloads.replace_key(session, payload_id, _store(state_key, payload_id, key))
            moved += 1
        return moved

    total = 0
    while moved := context.database.write(work):
        total += moved
    return total


def _current(context: Context) -> bytes:
    if not context.state_key:
        raise SealedPayloadLostError("the coordinator has no state key")
    return context.state_key


def _store(state_key: bytes, payload_id: str, key: PayloadKey) -> bytes:
    name = hkdf_expand(state_key, _NAME_INFO, NAME_BYTES)
    return name + key.store(hkdf_expand(state_key, _KEY_INFO), _associated(payload_id))


def _associated(payload_id: str) -> bytes:
    return _ASSOCIATED + payload_id.encode()
