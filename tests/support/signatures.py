"""Watches that no key signs while a write transaction is open."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from sqlalchemy.orm import Session

from qflare.crypto.signing import SigningKey
from qflare_server.keys.hardware import Pkcs11Module
from qflare_server.storage.database import Database

T = TypeVar("T")


class SignatureWatch:
    """Notes signatures that are made in write transactions, by any key of this process.

    Attributes:
        count: How many signatures were made.
        violations: What signed in a transaction, with the name of the thread that it was on.
    """

    def __init__(self) -> None:
        self.count = 0
        self.violations: list[str] = []
        self._thread = threading.local()

    def writing(self, work: Callable[[Session], T]) -> Callable[[Session], T]:
        """Return what does the work of a transaction and knows that it is one, whatever thread runs it."""

        def watched(session: Session) -> T:
            self._thread.writes = True
            try:
                return work(session)
            finally:
                self._thread.writes = False

        return watched

    def signing(self, sign: Callable[..., bytes]) -> Callable[..., bytes]:
        """Return what signs, and notes it where this thread is in a transaction."""

        def watched(*arguments: Any) -> bytes:
            self.count += 1
            if getattr(self._thread, "writes", False):
                self.violations.append(f"{sign.__qualname__} on {threading.current_thread().name}")
            return sign(*arguments)

        return watched


@contextmanager
def watch_signatures() -> Iterator[SignatureWatch]:
    """Watch every database and every key of this process."""
    watch = SignatureWatch()
    write = Database.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "write", lambda self, work: write(self, watch.writing(work)))
        for kind in (SigningKey, Pkcs11Module):
            patch.setattr(kind, "sign", watch.signing(kind.sign))
        yield watch
