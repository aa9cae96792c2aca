"""Embedded coordinator: the components that `registry` and `aggregator` share in this process.

They are opened on first use from `QFLARE_*` (an empty SQLite file is initialized, and missing keys are generated), or
are those of a coordinator in this process that shares them with `configure`. Nothing is opened at import. A coordinator
may serve the same database at the same time, in this process or another.

Connections and threads do not survive a fork. In a process that was forked after the parts were opened, every function
raises `ForkedError` at once; after `close` there, which leaves the parent's parts alone, they are opened anew.
"""

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.config import ServerConfig
from qflare_server.context import Context
from qflare_server.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    QflareError,
)
from qflare_server.keys import ensure_initialized
from qflare_server.serving.application import Application
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.devices.administration import Devices
from qflare_server.use_cases.in_process.devices import KnownDevices
from qflare_server.use_cases.in_process.training import InProcess
from qflare_server.use_cases.training_sessions.administration import Training
from qflare_server.use_cases.versions.download import Deliveries

CALLER: Final = Caller("system", "", "in-process")
"""Actor of embedding programs in the audit log."""


class ForkedError(RuntimeError):
    """The embedded coordinator was opened before this process was forked: call `close` here, or open it here first."""

    def __init__(self) -> None:
        super().__init__(
            "the embedded coordinator was opened before this process was forked: "
            "call close() in the forked process, which then opens its own"
        )


class OpenParts(Protocol):
    """The components that embedding needs, a subset of `qflare_server.serving.application.Application`."""

    @property
    def context(self) -> Context:
        """Database, payload store, keys and clock."""

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Pool of writers for large payloads."""


@dataclass(frozen=True)
class EmbeddedCoordinator:
    """Use cases of an embedding program."""

    context: Context
    executor: ThreadPoolExecutor
    devices: Devices
    known_devices: KnownDevices
    in_process: InProcess
    deliveries: Deliveries

    @classmethod
    def over(cls, parts: OpenParts) -> "EmbeddedCoordinator":
        """Build the use cases."""
        context, executor = parts.context, parts.executor
        return cls(
            context,
            executor,
            Devices(context),
            KnownDevices(context),
            InProcess(context, executor, Training(context)),
            Deliveries(context, executor),
        )

    def publish(self, training_session_id: str) -> None:
        """Run aggregation passes over one training session until there is no more work."""
        aggregator = Aggregator(self.context, self.executor, "in-process", only=training_session_id)
        while aggregator.run_once():
            pass


class _Process:
    """The components that are open in this process; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._embedded: EmbeddedCoordinator | None = None
        self._own: Application | None = None
        self._is_disowned = False
        self._inherited: list[object] = []

    def was_forked(self) -> None:
        """Disown in a forked child what the parent has opened; the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()
        if self._embedded is not None:
            # Kept for good: to end a parent's connections here would end them there.
            self._inherited += [self._embedded, self._own]
            self._embedded, self._own, self._is_disowned = None, None, True

    def current(self) -> EmbeddedCoordinator:
        with self._lock:
            if self._is_disowned:
                raise ForkedError
            if self._embedded is None:
                config = ServerConfig.from_env(os.environ)
                ensure_initialized(config)
                self._own = Application.open(config)
                self._embedded = EmbeddedCoordinator.over(self._own)
            return self._embedded

    def configure(self, parts: OpenParts | None) -> None:
        with self._lock:
            own, self._own, self._is_disowned = self._own, None, False
            self._embedded = None if parts is None else EmbeddedCoordinator.over(parts)
        if own is not None:
            own.close()


_PROCESS: Final = _Process()
os.register_at_fork(after_in_child=_PROCESS.was_forked)


def current() -> EmbeddedCoordinator:
    """Return the use cases of this process, opening them on first use.

    Raises:
        ForkedError: They were opened before this process was forked.
        ConfigError: The environment's settings are invalid.
            SchemaError: The database schema does not match this program.
            KeyStoreError: The keys cannot be read or generated.
    """
    return _PROCESS.current()


def configure(parts: OpenParts) -> None:
    """Share the components of a coordinator in this process, which remains responsible for closing them."""
    _PROCESS.configure(parts)


def close() -> None:
    """Close the components opened on first use and drop shared ones; the next call opens them again."""
    _PROCESS.configure(None)


REFUSALS: Final = (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)


@contextmanager
def refused(logger: logging.Logger, what: str) -> Iterator[list[QflareError]]:
    """Record a refusal and log it as a WARNING; other exceptions propagate."""
    refusals: list[QflareError] = []
    try:
        yield refusals
    except REFUSALS as error:
        logger.warning("%s refused: %s: %s", what, error.reason, error)
        refusals.append(error)
