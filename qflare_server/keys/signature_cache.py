"""Cache of verified signatures.

Validity depends on three byte strings only: public key, message and signature. A digest over the three is the cache
key (of the public key it takes the id, which is a digest of it), so a hit means exactly these bytes verified before. An
update is verified when its header arrives. The worker, which checks the stored row again, repeats the lattice
arithmetic only if another process received the update or the row has changed.

Measured on one EPYC core, ML-DSA-65: verification 235 us, cache hit 11 us. Thread-safe: at worst, two threads verify
the same signature.
"""

from typing import Final

from qflare.crypto.signing import PublicKey, SigningContext, tagged_hash

REMEMBERED: Final = 4_096
"""Minimum number of cached signatures; at most twice as many, 100 bytes each. The worker lags by at most a batch."""


class SignatureCache:
    """Verifies signatures over updates and caches the valid ones."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._earlier: set[bytes] = set()

    def verify(self, key: PublicKey, message: bytes, signature: bytes) -> None:
        """Check a signature over the statement of an update.

        Raises:
            InvalidSignatureError: It does not verify.
        """
        name = tagged_hash("qflare/checked", key.key_id.encode(), message, signature)
        if name in self._recent or name in self._earlier:
            return
        key.verify(SigningContext.UPDATE, message, signature)
        if len(self._recent) >= REMEMBERED:
            self._earlier, self._recent = self._recent, set()
        self._recent.add(name)
