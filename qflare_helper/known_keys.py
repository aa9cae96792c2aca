"""Signature keys of devices that were read before: to load a key costs a twelfth of the verification of a signature.

A key is found by its algorithm and bytes, so it is the one that would be read anew. Whose key it is, its evidence shows
each time.
"""

from typing import Final

from qflare.crypto.signing import InvalidKeyError, PublicKey
from qflare.v1 import security_pb2
from qflare_helper.remembered import Remembered

MAX_KEYS: Final = 512
"""Most keys that are remembered, about 13 KB each; those that were not used for the longest time are forgotten."""


class KnownKeys:
    """Keys that were read before. Thread-safe.

    Args:
        most: Most keys that are remembered.
    """

    def __init__(self, most: int = MAX_KEYS) -> None:
        self._keys: Remembered[tuple[int, bytes], PublicKey] = Remembered(most)

    def read(self, message: security_pb2.PublicKey) -> PublicKey:
        """Read a key, or find it; as `PublicKey.from_proto`.

        Raises:
            InvalidKeyError: Unknown algorithm, wrong length, or a key id of another key.
        """
        place = message.algorithm, message.data
        known = self._keys.find(place)
        if known is None:
            known = PublicKey.from_proto(message)
            self._keys.keep(place, known)
        if known.key_id != message.key_id:
            raise InvalidKeyError("key id does not belong to the key")
        return known
