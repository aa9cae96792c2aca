"""Per-call state: caller, peer, request id; and the count of calls in flight."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from qflare_server.errors import UnauthenticatedError
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.authentication import NOBODY, Principal

REQUEST_ID_BITS: Final = 64


@dataclass
class Call:
    """One RPC in flight.

    `find_peer` returns the caller's address, which most calls do not need. `tls_group` is the key exchange group of its
    connection, empty without TLS. `kind` is unary, client_stream, server_stream or bidi_stream. `traceparent` is the
    caller's trace context as received; empty if there is none.
    """

    method: str
    request_id: str
    find_peer: Callable[[], str]
    tls_group: str = ""
    kind: str = "unary"
    traceparent: str = ""
    principal: Principal = field(default=NOBODY)

    @property
    def caller(self) -> Caller:
        """The caller's name for the audit log."""
        return self.principal.caller(self.find_peer())

    @property
    def device_id(self) -> str:
        """The calling device.

        Raises:
            UnauthenticatedError: The caller is not a device.
        """
        if self.principal.device_id is None:
            raise UnauthenticatedError
        return self.principal.device_id


_CURRENT: ContextVar[Call] = ContextVar("qflare_call")


def current_call() -> Call:
    """Return the call that this thread is handling."""
    return _CURRENT.get()


@contextmanager
def answering(call: Call) -> Iterator[Call]:
    """Set the current call of this thread."""
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)


class RunningCalls:
    """Counts the calls in flight; thread-safe."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Count a call."""
        with self._changed:
            self._count += 1

    def end(self) -> None:
        """Stop counting a call: its response was sent."""
        with self._changed:
            self._count -= 1
            if not self._count:
                self._changed.notify_all()

    def wait_until_none(self, timeout_s: float) -> bool:
        """Wait until no call is in flight; return whether that is the case."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)
