"""Signature keys of devices that were read before: to load a key costs a twelfth of the verification of a signature.

A key is found by its algorithm and bytes, so it is the one that would be read anew. Whose key it is, its evidence shows
each time.
"""

from collections import OrderedDict
from threading import Lock
from typing import Final

from qflare.crypto.signing import InvalidKeyError, PublicKey
from qflare.v1 import security_pb2

MAX_KEYS: Final = 512
"""Most keys that are remembered, about 13 KB each; those that were not used for the longest time are forgotten."""


class KnownKeys:
    """Keys that were read before. Thread-safe.

    Args:
        most: Most keys that are remembered.
    """

    def __init__(self, most: int = MAX_KEYS) -> None:
        self._most = most
        self._lock = Lock()
        self._keys: OrderedDict[tuple[int, bytes], PublicKey] = OrderedDict()

    def read(self, message: security_pb2.PublicKey) -> PublicKey:
        """Read a key, or find it; as `PublicKey.from_proto`.

        Raises:
            InvalidKeyError: Unknown algorithm, wrong length, or a key id of another key.
        """
        place = message.algorithm, message.data
        with self._lock:
            known = self._keys.get(place)
            if known is not None:
                self._keys.move_to_end(place)
        if known is None:
            known = PublicKey.from_proto(message)
            self._remember(place, known)
        if known.key_id != message.key_id:
            raise InvalidKeyError("key id does not belong to the key")
        return known

    def _remember(self, place: tuple[int, bytes], key: PublicKey) -> None:
        with self._lock:
            self._keys[place] = key
            if len(self._keys) > self._most:
                self._keys.popitem(last=False)
