"""Dependencies of every use case: configuration, database, payload store, signer, clock, telemetry."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from qflare.crypto.signing import PublicKey
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_server.config import ServerConfig
from qflare_server.errors import PayloadStoreNotConfiguredError
from qflare_server.storage.database import Database
from qflare_server.storage.payload_store import PayloadStore, StoreCatalog

Clock = Callable[[], datetime]
"""Returns the time in UTC."""


Decapsulate = Callable[[str, bytes], bytes]
"""Decapsulation: takes a key id and an encapsulation, returns 32 bytes.

Raises `UnsealError`, or `UnknownKeyError` if the key is not held or no longer accepted.
"""


class StatementSigner(Protocol):
    """Signs published statements without exposing the keys."""

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        """Sign a payload with the key of a role, in the role's domain."""

    def accepts(
        self, role: security_pb2.KeyRole.ValueType, envelope: security_pb2.SignedEnvelope
    ) -> bool:
        """Return whether a signature names a key that the keyset in force has for a role; it is not verified."""

    def renew_tasks(self) -> int:
        """Sign anew the tasks of rounds in progress whose key leaves with the next keyset; return how many."""


class SignatureVerifier(Protocol):
    """Verifies signatures over the statements of updates."""

    def verify(self, key: PublicKey, message: bytes, signature: bytes) -> None:
        """Check a signature.

        Raises:
            InvalidSignatureError: It does not verify.
        """


class UnprovenKeyError(ValueError):
    """No signed evidence binds a key to a device."""


class IdentityProver(Protocol):
    """Verifies by signed evidence that keys belong to devices."""

    def require(self, device_id: str, key_id: str) -> None:
        """Check that a signature key, or the KEM key introduced with one, belongs to a device.

        Raises:
            UnprovenKeyError: No signed evidence binds the key to the device.
        """

    def problems(self, named: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], str]:
        """Return the reasons why keys are unproven, by device id and key id."""


class Helpers(Protocol):
    """The helpers for secure aggregation that this coordinator knows."""

    def documents(self) -> Mapping[str, security_pb2.SignedEnvelope]:
        """Return the signed documents by helper id."""

    def sign_request(self, payload: bytes) -> security_pb2.SignedEnvelope:
        """Sign an `UnmaskingRequest` with the task key."""

    def unmask(
        self, helper_id: str, parts: Iterator[helper_service_pb2.UnmaskRequest]
    ) -> Iterator[helper_service_pb2.UnmaskResponse]:
        """Call a helper.

        Raises:
            HelperUnavailableError: While iterating: it is unknown, cannot be reached or did not answer in time.
            HelperRefusedError: While iterating: it refused.
        """

    def close(self) -> None:
        """Cancel the calls; later ones fail."""


NOTHING: Final[AbstractContextManager[None]] = nullcontext()


class Telemetry:
    """No-op telemetry sink."""

    @property
    def records_spans(self) -> bool:
        """Whether `span` records the steps of each update, so that they have to be run apart from those of others."""
        return False

    def call_started(self, method: str, kind: str) -> None:
        """Called when a call arrives; `kind` is unary, client_stream, server_stream or bidi_stream."""

    def message_received(self, method: str, kind: str) -> None:
        """Called for each request message."""

    def message_sent(self, method: str, kind: str) -> None:
        """Called for each response message."""

    def call_handled(
        self, method: str, kind: str, code: str, duration_s: float, reason: str
    ) -> None:
        """Called when a call has ended; `reason` is the error's machine word, empty on success."""

    def update_relayed(self, reason: str) -> None:
        """Called with the outcome of an update that came with others; `reason` is empty for an accepted one."""

    def bytes_received(self, count: int) -> None:
        """Called with the payload size of an accepted update."""

    def bytes_sent(self, count: int) -> None:
        """Called with the number of payload bytes sent of a version."""

    def updates_folded(self, count: int, size_bytes: int, duration_s: float) -> None:
        """Called when a batch of updates has been folded."""

    def round_published(
        self, aggregated_count: int, rejected_count: int, collected_s: float, published_s: float
    ) -> None:
        """Called when a round is published, with the time of collection and of publication."""

    def slice_folded(self, outcome: str, duration_s: float) -> None:
        """Called after work on a slice of another coordinator's round: recorded, refused or failed."""

    def helper_asked(self, outcome: str, duration_s: float) -> None:
        """Called after a request to a helper: answered, refused, updates_refused or unavailable."""

    def webhook_attempted(self, outcome: str) -> None:
        """Called after an attempt to deliver a webhook; the outcome is delivered, failed or dropped."""

    def span(
        self, name: str, *, links: Sequence[str] = (), **attributes: Any
    ) -> AbstractContextManager[None]:
        """Return a context manager for a trace span of one step of an update's processing.

        Args:
            name: Name of the step.
            links: Ids of the updates whose spans this one links to.
            attributes: Span attributes; an `update_id` registers the span under that id.
        """
        del name, links, attributes
        return NOTHING


def utc_now() -> datetime:
    """Return the current time; the only function that reads the clock."""
    return datetime.now(UTC)


class UnknownKeyError(ValueError):
    """No key of this id is held."""


EXPIRY_WARNING: Final = timedelta(days=60)
"""Warning period before a keyset's expiry; long enough for the holders of offline root keys to meet."""


@dataclass(frozen=True)
class KeysetStatus:
    """The keyset in force.

    Attributes:
        version: Its version.
        expires_at: Its expiry or that of the root document, whichever is earlier.
    """

    version: int
    expires_at: datetime

    def expires_soon(self, now: datetime) -> bool:
        """Return whether it has expired or does within `EXPIRY_WARNING`."""
        return self.expires_at - now < EXPIRY_WARNING


@dataclass(frozen=True)
class Context:
    """The dependencies of every use case, built once by the composition root."""

    config: ServerConfig
    database: Database
    store: PayloadStore
    signer: StatementSigner
    clock: Clock
    signatures: SignatureVerifier = field(kw_only=True)
    """Verifies signatures over updates."""
    identities: IdentityProver = field(kw_only=True)
    """Verifies that keys belong to devices; a database row alone proves nothing."""
    wake: Callable[[], None]
    """Wakes the aggregation worker; only a hint."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    """Receives telemetry events."""
    state_key: bytes = field(default=b"", repr=False)
    """32 random bytes shared by replicas, never stored in the database; keys of stored secrets derive from it."""
    earlier_state_keys: Sequence[bytes] = field(default=(), repr=False)
    """Previous state keys, latest first, used only to open stored secrets."""
    draw_random: Callable[[int], bytes] = field(default=os.urandom, repr=False)
    """Draws random bytes for noise, nonces and ids of training sessions; only a simulation replaces it."""
    decapsulate: Decapsulate | None = field(default=None, repr=False)
    """Recovers a secret encapsulated to an accepted session KEM key; None without server keys."""
    keyset_status: Callable[[], KeysetStatus] | None = None
    """Returns the keyset in force; None without server keys."""
    helpers: Helpers | None = None
    """Helpers for secure aggregation; None where there are none, as in commands that only read."""
    other_stores: Mapping[str, PayloadStore] = field(default_factory=dict)
    """Payload stores by name that are configured beside `store`, which takes all new payloads."""

    @property
    def store_names(self) -> frozenset[str]:
        """Names of the configured payload stores."""
        return frozenset({self.store.name, *self.other_stores})

    def store_of(self, name: str | None) -> PayloadStore:
        """Return the payload store of a payload whose row names it.

        Raises:
            PayloadStoreNotConfiguredError: It is not configured.
        """
        if name == self.store.name:
            return self.store
        try:
            return self.other_stores[name or ""]
        except KeyError:
            raise PayloadStoreNotConfiguredError(
                f"the payload store {name} is not configured"
            ) from None

    @property
    def stores(self) -> tuple[PayloadStore, ...]:
        """All open payload stores, the one for new payloads first."""
        others = self.other_stores
        opened = others.opened if isinstance(others, StoreCatalog) else others.values()
        return (self.store, *opened)
