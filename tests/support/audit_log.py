"""A coordinator's parts for tests of the audit log: real keys, a clock that stands still, rows by the hundred."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import PublicKey, SigningContext, SigningKey
from qflare.evidence.forms import check_form
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import Context
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.signature_cache import SignatureCache
from qflare_server.storage.database import Database
from qflare_server.storage.repository import audit
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel
from tests.conftest import FakeClock

START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
CALLER = Caller("admin:alice", "192.0.2.7", "token")


@dataclass
class LogSigner:
    """Signs heads with a key in memory."""

    key: SigningKey = field(default_factory=SigningKey.generate)
    count: int = 0

    @property
    def public(self) -> PublicKey:
        return self.key.public

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        assert role == security_pb2.KEY_ROLE_LOG
        self.count += 1
        check_form(SigningContext.TREE_HEAD, payload)
        return sign_envelope(self.key, SigningContext.TREE_HEAD, payload)

    def accepts(
        self, role: security_pb2.KeyRole.ValueType, envelope: security_pb2.SignedEnvelope
    ) -> bool:
        assert role == security_pb2.KEY_ROLE_LOG
        return any(signature.key_id == self.public.key_id for signature in envelope.signatures)

    def renew_tasks(self) -> int:
        return 0

    def replace_key(self) -> None:
        """Publish a keyset without the present key."""
        self.key = SigningKey.generate()

    def registrar_keys(self, *, fresh: bool = False) -> Collection[PublicKey]:
        del fresh
        return ()


def make_context(
    config: ServerConfig, database: Database, clock: FakeClock, signer: LogSigner
) -> Context:
    return Context(
        config,
        database,
        cast("Any", None),
        signer,
        clock,
        lambda: None,
        signatures=SignatureCache(),
        identities=DeviceIdentities(database, config.realm, signer),
    )


def record_many(database: Database, count: int, at: datetime = START, *, first: int = 0) -> None:
    def work(session: Any) -> None:
        for number in range(first, first + count):
            event = Event(
                "test.happened",
                f"thing:{number}",
                RiskLevel.MEDIUM,
                {"number": number, "why": "so"},
            )
            audit.record(session, CALLER, event, at)

    database.write(work)
