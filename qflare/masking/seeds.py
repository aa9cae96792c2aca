"""Seeds of masks, sealed to helpers with HPKE.

A sealed seed opens only for the helper, and only together with the update that it was made for: realm, training
session, round, task, update, device and the digest of the masked payload are bound to it. A seed cannot be moved to
another update, and the masked vector cannot be replaced.
"""

from typing import Final

from qflare.crypto.sealing import (
    SEAL_OVERHEAD_BYTES,
    KemKey,
    KemPublicKey,
    UnsealError,
    open_sealed,
    seal,
)
from qflare.crypto.signing import tagged_hash
from qflare.masking.masks import SEED_BYTES
from qflare.v1 import security_pb2

SEALED_SEED_BYTES: Final = SEAL_OVERHEAD_BYTES + SEED_BYTES
"""Length of a sealed seed, 1168."""

_TAG: Final = "qflare/v1/masking-seed"


def seal_seed(
    seed: bytes, helper_id: str, key: KemPublicKey, statement: security_pb2.UpdateStatement
) -> security_pb2.SealedSeed:
    """Seal a seed to a helper.

    Args:
        seed: 32 bytes.
        helper_id: Id of the helper's signature key.
        key: The helper's KEM key.
        statement: Statement of the update, complete except for seeds, key id and signature.
    """
    sealed = seal(key, seed, _info(helper_id, statement))
    return security_pb2.SealedSeed(helper_id=helper_id, kem_key_id=key.key_id, sealed_seed=sealed)


def open_seed(
    sealed: security_pb2.SealedSeed, key: KemKey, statement: security_pb2.UpdateStatement
) -> bytes:
    """Return the seed of an update, 32 bytes.

    Raises:
        UnsealError: It was sealed to another key or for another update, or was changed.
    """
    if len(sealed.sealed_seed) != SEALED_SEED_BYTES:
        raise UnsealError(f"sealed seed has {len(sealed.sealed_seed)} bytes")
    return open_sealed(key.decapsulate, sealed.sealed_seed, _info(sealed.helper_id, statement))


def _info(helper_id: str, statement: security_pb2.UpdateStatement) -> bytes:
    texts = (
        helper_id,
        statement.realm,
        statement.training_session_id,
        str(statement.round_number),
        statement.masking.task_digest,
        statement.update_id,
        statement.device_id,
        statement.payload_digest,
    )
    return tagged_hash(_TAG, *(text.encode() for text in texts))
