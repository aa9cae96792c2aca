"""Signed envelopes: a serialized message and the signatures over its exact bytes.

The signer serializes the message once; those bytes are verified, stored and hashed.
`open_envelope` counts only keys that the caller trusts, and rejects an envelope if any of their
signatures is invalid. It does not interpret the payload: the caller (`qflare.evidence.statements`)
checks that its fields match the context.
"""

from collections.abc import Iterable
from typing import Final

from google.protobuf.message import Message

from qflare.crypto.signing import (
    MAX_MESSAGE_BYTES,
    InvalidKeyError,
    InvalidSignatureError,
    PublicKey,
    Signer,
    SigningContext,
    algorithm_of,
    wire_algorithm,
)
from qflare.v1 import security_pb2

MAX_SIGNATURE_COUNT: Final = 16
"""Most signatures that an envelope holds."""


def sign_envelope(
    key: Signer, context: SigningContext, message: Message | bytes
) -> security_pb2.SignedEnvelope:
    """Serialize a message (or take a payload as it is) and sign it.

    Raises:
        ValueError: The payload is longer than `MAX_MESSAGE_BYTES`.
        SigningError: The signer failed.
    """
    if isinstance(message, Message):
        message = message.SerializeToString(deterministic=True)
    return add_signature(security_pb2.SignedEnvelope(payload=message), key, context)


def add_signature(
    envelope: security_pb2.SignedEnvelope, key: Signer, context: SigningContext
) -> security_pb2.SignedEnvelope:
    """Return a copy of an envelope with one more signature over the same payload.

    Raises:
        ValueError: The payload is too long, the envelope is full, or the key has already signed it.
        SigningError: The signer failed.
    """
    signed = {signature.key_id for signature in envelope.signatures}
    if key.public.key_id in signed or len(signed) >= MAX_SIGNATURE_COUNT:
        raise ValueError("the key has already signed, or the envelope is full")
    extended = security_pb2.SignedEnvelope()
    extended.CopyFrom(envelope)
    extended.signatures.add(
        key_id=key.public.key_id,
        algorithm=wire_algorithm(key.public.algorithm),
        signature=key.sign(context, envelope.payload),
    )
    return extended


def open_envelope(
    envelope: security_pb2.SignedEnvelope,
    context: SigningContext,
    keys: Iterable[PublicKey],
    threshold: int = 1,
) -> bytes:
    """Check an envelope and return its payload.

    Args:
        envelope: As received.
        context: Expected signing context.
        keys: Trusted keys. Signatures by other keys are ignored.
        threshold: Minimum number of trusted keys that must have signed, >= 1.

    Raises:
        InvalidSignatureError: Too few of the keys have signed, a signature of one of them is wrong
            or names another algorithm, a key signed twice, or a limit is passed.
    """
    if threshold < 1:
        raise InvalidSignatureError(f"threshold is {threshold}, want >= 1")
    _check_limits(envelope)
    trusted = {key.key_id: key for key in keys}
    signed_count = 0
    for signature in envelope.signatures:
        key = trusted.get(signature.key_id)
        if key is None:
            continue
        if signature.algorithm != wire_algorithm(key.algorithm):
            raise InvalidSignatureError(_other_algorithm(signature.algorithm))
        key.verify(context, envelope.payload, signature.signature)
        signed_count += 1
    if signed_count < threshold:
        raise InvalidSignatureError(f"signed by {signed_count} trusted keys, want {threshold}")
    return envelope.payload


def _other_algorithm(number: int) -> str:
    try:
        name = algorithm_of(number).name
    except InvalidKeyError as error:
        return str(error)
    return f"signature names {name}, which is another algorithm than its key has"


def _check_limits(envelope: security_pb2.SignedEnvelope) -> None:
    if len(envelope.payload) > MAX_MESSAGE_BYTES:
        raise InvalidSignatureError(f"payload is longer than {MAX_MESSAGE_BYTES} bytes")
    key_ids = [signature.key_id for signature in envelope.signatures]
    if len(key_ids) > MAX_SIGNATURE_COUNT:
        raise InvalidSignatureError(f"envelope has more than {MAX_SIGNATURE_COUNT} signatures")
    if len(set(key_ids)) != len(key_ids):
        raise InvalidSignatureError("a key signed twice")
