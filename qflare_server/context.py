"""What every use case is built from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from qflare.v1 import security_pb2
from qflare_server.checked_signatures import CheckedSignatures
from qflare_server.config import ServerConfig
from qflare_server.database import Database
from qflare_server.repository.payload_stores import PayloadStore
from qflare_server.telemetry import Telemetry

Clock = Callable[[], datetime]
"""Gives the time in UTC."""


Decapsulate = Callable[[str, bytes], bytes]
"""Takes a key id and an encapsulation, gives 32 bytes.

Raises `UnsealError`, `UnknownKeyError` where the key is not held or no longer accepted.
"""


class StatementSigner(Protocol):
    """Signs what the coordinator publishes; the keys stay behind it."""

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        """Sign a payload with the key of a role, in the role's domain."""


@dataclass(frozen=True)
class Context:
    """The parts that the composition root hands to every use case."""

    config: ServerConfig
    database: Database
    store: PayloadStore
    signer: StatementSigner
    clock: Clock
    wake: Callable[[], None]
    """Tells the aggregation worker that there may be something to do; only a hint."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    """Hears of what happens."""
    state_key: bytes = field(default=b"", repr=False)
    """32 random bytes that replicas share and no database holds; keys of stored secrets are derived from it."""
    signatures: CheckedSignatures = field(default_factory=CheckedSignatures)
    """Verifies signatures over updates, and knows those that it has verified."""
    earlier_state_keys: Sequence[bytes] = field(default=(), repr=False)
    """State keys before it, the latest first: what was stored under them is still opened."""
    decapsulate: Decapsulate | None = field(default=None, repr=False)
    """Recovers a secret that was encapsulated to an accepted session KEM key; None where there is none."""
