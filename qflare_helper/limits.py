"""Limits on calls: how long a caller may be silent, and how many calls of strangers are held at once.

A caller is a *stranger* until the signatures of its request were verified. The calls of all strangers together, and
those of one host, are few, so that they leave threads to coordinators.
"""

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import unquote

from qflare_helper.errors import BusyError

STALL_S: Final = 20.0
"""Seconds within which the next part of a request must arrive."""

MAX_STRANGERS: Final = 32
"""Most calls of strangers at once."""

MAX_STRANGERS_OF_HOST: Final = 8
"""Most calls of strangers from one host, or one /64 network of IPv6."""

_LOOK_S: Final = 1.0

T = TypeVar("T")


class Strangers:
    """Counts the calls of strangers. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, peer: str) -> Callable[[], None]:
        """Count a call; return a function that ends the count, and may be called twice.

        Args:
            peer: Address of the caller, as gRPC writes it.

        Raises:
            BusyError: There are too many, or too many of this host.
        """
        host = host_of(peer)
        with self._lock:
            if self._counts.total() >= MAX_STRANGERS or self._counts[host] >= MAX_STRANGERS_OF_HOST:
                raise BusyError("too many requests are in progress")
            self._counts[host] += 1
        return _once(lambda: self._leave(host))

    def _leave(self, host: str) -> None:
        with self._lock:
            self._counts[host] -= 1
            if not self._counts[host]:
                del self._counts[host]


@dataclass
class _Watch:
    """A call, and when its next part is due."""

    cancel: Callable[[], object]
    due_at: float = field(default=float("inf"))


class StallGuard:
    """Cancels calls whose next part does not arrive in time; one thread for all of them."""

    def __init__(self) -> None:
        self._by_id: dict[int, _Watch] = {}
        self._lock = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="stall-guard", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._ends = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(
        self, parts: Iterator[T], cancel: Callable[[], object], stall_s: float = STALL_S
    ) -> Iterator[Iterator[T]]:
        """Return the parts of a request, each of which must arrive within `stall_s` after it is asked for.

        Args:
            parts: Of the request.
            cancel: Ends the call.
            stall_s: Seconds.
        """
        watch = _Watch(cancel)
        with self._lock:
            self._by_id[id(watch)] = watch
            self._lock.notify()
        try:
            yield _paced(parts, watch, stall_s)
        finally:
            with self._lock:
                del self._by_id[id(watch)]

    def _run(self) -> None:
        while self._wait():
            now = time.monotonic()
            with self._lock:
                late = [watch for watch in self._by_id.values() if watch.due_at < now]
            for watch in late:
                watch.cancel()

    def _wait(self) -> bool:
        """Wait until it is time to look, without an end while there are no calls; return False once it is over."""
        with self._lock:
            self._lock.wait_for(lambda: self._by_id or self._ends)
            self._lock.wait_for(lambda: self._ends, _LOOK_S)
            return not self._ends


def _paced(parts: Iterator[T], watch: _Watch, stall_s: float) -> Iterator[T]:
    while True:
        watch.due_at = time.monotonic() + stall_s
        try:
            part = next(parts)
        except StopIteration:
            return
        finally:
            watch.due_at = float("inf")
        yield part


def host_of(peer: str) -> str:
    """Return what counts as one host: an IPv4 address, a /64 network of IPv6, or the peer as it is."""
    kind, _, rest = unquote(peer).partition(":")
    text = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return kind
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another one the first time."""
    pending = [function]

    def call() -> None:
        if pending:
            pending.pop()()

    return call
