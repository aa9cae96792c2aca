"""Dependencies of every use case: configuration, database, payload store, signer, clock, telemetry."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from qflare.crypto.signing import PublicKey
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.storage.database import Database
from qflare_server.storage.payload_store import PayloadStore

Clock = Callable[[], datetime]
"""Gives the time in UTC."""


Decapsulate = Callable[[str, bytes], bytes]
"""Takes a key id and an encapsulation, gives 32 bytes.

Raises `UnsealError`, `UnknownKeyError` where the key is not held or no longer accepted.
"""


class StatementSigner(Protocol):
    """Signs published statements without exposing the keys."""

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        """Sign a payload with the key of a role, in the role's domain."""


class SignatureVerifier(Protocol):
    """Verifies signatures over the statements of updates."""

    def verify(self, key: PublicKey, message: bytes, signature: bytes) -> None:
        """Check a signature.

        Raises:
            InvalidSignatureError: It does not verify.
        """


class UnprovenKeyError(ValueError):
    """Nothing that was signed shows that a key is a device's."""


class IdentityProver(Protocol):
    """Decides by signed evidence which keys are a device's."""

    def require(self, device_id: str, key_id: str) -> None:
        """Check that a signature key, or the KEM key that came with one, is a device's.

        Raises:
            UnprovenKeyError: Nothing that was signed shows that it is.
        """

    def problems(self, named: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], str]:
        """Return, by ids of device and key, why keys are not shown to be their devices'."""


NOTHING: Final[AbstractContextManager[None]] = nullcontext()


class Telemetry:
    """No-op telemetry sink."""

    def call_started(self, method: str, kind: str) -> None:
        """Called when a call arrives; `kind` is unary, client_stream, server_stream or bidi_stream."""

    def message_received(self, method: str, kind: str) -> None:
        """Called for each request message."""

    def message_sent(self, method: str, kind: str) -> None:
        """Called for each response message."""

    def call_handled(
        self, method: str, kind: str, code: str, duration_s: float, reason: str
    ) -> None:
        """Called when a call has been answered; `reason` is the machine word of its error, empty where it is OK."""

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

    def span(
        self, name: str, *, links: Sequence[str] = (), **attributes: Any
    ) -> AbstractContextManager[None]:
        """Return a block that is one step of the way of an update.

        Args:
            name: Name of the step.
            links: Ids of the updates that the step goes on with.
            attributes: Facts about it; an `update_id` makes it known under that id.
        """
        del name, links, attributes
        return NOTHING


def utc_now() -> datetime:
    """Return the time: the one place that reads the clock."""
    return datetime.now(UTC)


class UnknownKeyError(ValueError):
    """No key of this id is held."""


EXPIRY_WARNING: Final = timedelta(days=60)
"""How long before a keyset expires the warnings begin: time for the holders of offline root keys to meet."""


@dataclass(frozen=True)
class KeysetStatus:
    """The keyset in force.

    Attributes:
        version: Its version.
        expires_at: When devices stop trusting it: its expiry, or that of the root document if that is earlier.
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
    """Decides whose keys are: a row of the database alone makes no key a device's."""
    wake: Callable[[], None]
    """Tells the aggregation worker that there may be something to do; only a hint."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    """Receives telemetry events."""
    state_key: bytes = field(default=b"", repr=False)
    """32 random bytes that replicas share and no database holds; keys of stored secrets are derived from it."""
    earlier_state_keys: Sequence[bytes] = field(default=(), repr=False)
    """State keys before it, the latest first: what was stored under them is still opened."""
    decapsulate: Decapsulate | None = field(default=None, repr=False)
    """Recovers a secret that was encapsulated to an accepted session KEM key; None where there is none."""
    keyset_status: Callable[[], KeysetStatus] | None = None
    """Returns the keyset in force; None where there is none."""
