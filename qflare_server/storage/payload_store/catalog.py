"""Payload stores that are opened when a payload's row first names them."""

import threading
from collections.abc import Callable, Iterator, Mapping

from qflare_server.storage.payload_store.interface import PayloadStore


class StoreCatalog(Mapping[str, PayloadStore]):
    """Configured payload stores by name; thread-safe.

    Args:
        openers: Functions that open each store. Looking a store up calls its function, and raises what it raises, until
            it succeeds.
    """

    def __init__(self, openers: Mapping[str, Callable[[], PayloadStore]]) -> None:
        self._lock = threading.Lock()
        self._openers = dict(openers)
        self._opened: dict[str, PayloadStore] = {}

    def __getitem__(self, name: str) -> PayloadStore:
        """Return a store, opened."""
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._openers[name]()
            return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._openers)

    def __len__(self) -> int:
        """Return the number of configured stores."""
        return len(self._openers)

    @property
    def opened(self) -> tuple[PayloadStore, ...]:
        """The stores that are open."""
        with self._lock:
            return tuple(self._opened.values())
