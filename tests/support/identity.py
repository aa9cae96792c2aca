"""A coordinator's identity and devices that enroll and log in, without a network: real keys, real use cases."""

import shutil
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select
from sqlalchemy.orm import Session

from qflare.crypto.envelope import add_signature, sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Signer, SigningContext, SigningKey
from qflare.protocol.enrollment import DeviceEnrollment
from qflare.protocol.login import DeviceLogin, SessionKeys
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import Clock, Context
from qflare_server.keys import KeyFolder, ServerKeys
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.signature_cache import SignatureCache
from qflare_server.storage.database import Database
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.tables import AuditLog
from qflare_server.use_cases.access.authentication import Authentication
from qflare_server.use_cases.access.login import Login
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.access.tokens import Tokens
from qflare_server.use_cases.devices.administration import Devices
from qflare_server.use_cases.devices.enrollment import Enrollment, EnrollmentResult
from qflare_server.use_cases.devices.key_rotation import KeyRotations

CHEAP = Cost(iterations=1, memory_kib=32, lanes=1)
CALLER = Caller("anonymous", "192.0.2.7", "none")
ADMIN = Caller("admin:alice", "192.0.2.8", "token")


@dataclass(frozen=True)
class Coordinator:
    """The use cases of one replica around identity."""

    context: Context
    keys: ServerKeys
    enrollment: Enrollment
    key_rotations: KeyRotations
    login: Login
    tokens: Tokens
    devices: Devices
    authentication: Authentication

    @classmethod
    def open(cls, config: ServerConfig, database: Database, clock: Clock) -> "Coordinator":
        keys = ServerKeys.load(config, database, clock)
        context = Context(
            config,
            database,
            cast("Any", None),
            keys,
            clock,
            lambda: None,
            signatures=SignatureCache(),
            identities=DeviceIdentities(database, keys.realm, keys),
        )
        return cls(
            context,
            keys,
            Enrollment(context, keys),
            KeyRotations(context, keys),
            Login(context, keys),
            Tokens(context),
            Devices(context),
            Authentication(context, Presence(config, database)),
        )

    def replica(self, **changes: Any) -> "Coordinator":
        """Open another process on the same database, with other settings if wanted."""
        config = replace(self.context.config, **changes)
        return Coordinator.open(config, self.context.database, self.context.clock)

    def enrollment_token(self, device_id: str = "", lifetime_s: float | None = None) -> str:
        issued = self.tokens.issue_enrollment(ADMIN, device_id=device_id, lifetime_s=lifetime_s)
        return issued[0].secret

    def events(self, event_type: str = "") -> list[AuditLog]:
        with self.context.database.read() as session:
            query = select(AuditLog).order_by(AuditLog.id)
            if event_type:
                query = query.where(AuditLog.event_type == event_type)
            return list(session.scalars(query))


@dataclass
class SimulatedDevice:
    """The device's side, with keys in memory."""

    signing: Signer = field(default_factory=SigningKey.generate)
    kem: KemKey = field(default_factory=KemKey.generate)
    device_id: str = ""

    def enrollment(
        self, coordinator: Coordinator, token: str, profile: bytes = b""
    ) -> DeviceEnrollment:
        return DeviceEnrollment(
            realm=coordinator.keys.realm,
            enrollment_token=token,
            signing_key=self.signing,
            kem_key=self.kem.public,
            decapsulate=self.kem.decapsulate,
            server_key=coordinator.keys.trust.kem_keys()[0],
            device_profile=profile,
        )

    def confirmation(
        self, coordinator: Coordinator, token: str, profile: bytes = b""
    ) -> security_pb2.EnrollmentConfirmation:
        exchange = self.enrollment(coordinator, token, profile)
        return exchange.confirm(coordinator.enrollment.begin(CALLER, exchange.request()))

    def enroll(
        self, coordinator: Coordinator, token: str = "", profile: bytes = b""
    ) -> EnrollmentResult:
        token = token or coordinator.enrollment_token()
        confirmation = self.confirmation(coordinator, token, profile)
        enrolled = coordinator.enrollment.register(CALLER, confirmation)
        self.device_id = enrolled.device_id
        return enrolled

    def start_login(self, coordinator: Coordinator, device_id: str = "") -> DeviceLogin:
        return DeviceLogin(
            realm=coordinator.keys.realm,
            device_id=device_id or self.device_id,
            signing_key=self.signing,
            server_key=coordinator.keys.trust.kem_keys()[0],
        )

    def proof(
        self, coordinator: Coordinator, device_id: str = ""
    ) -> tuple[SessionKeys, security_pb2.SessionProof]:
        login = self.start_login(coordinator, device_id)
        return login.prove(coordinator.login.begin(CALLER, login.hello(), ""))

    def log_in(self, coordinator: Coordinator) -> tuple[SessionKeys, security_pb2.TokenGrant]:
        keys, proof = self.proof(coordinator)
        return keys, keys.open_grant(coordinator.login.authenticate(CALLER, proof))

    def rotation(
        self, following: "SimulatedDevice", sequence_number: int, at: datetime, **changes: Any
    ) -> security_pb2.SignedEnvelope:
        statement = self.rotation_statement(following, sequence_number, at, **changes)
        envelope = sign_envelope(self.signing, SigningContext.ROTATION, statement)
        return add_signature(envelope, following.signing, SigningContext.ROTATION)

    def rotation_statement(
        self, following: "SimulatedDevice", sequence_number: int, at: datetime, **changes: Any
    ) -> security_pb2.KeyRotation:
        moment = Timestamp()
        moment.FromDatetime(at)
        fields: dict[str, Any] = {
            "realm": "qflare",
            "device_id": self.device_id,
            "sequence_number": sequence_number,
            "previous_key_id": self.signing.public.key_id,
            "signature_key": following.signing.public.to_proto(),
            "kem_key": following.kem.public.to_proto(),
            "create_time": moment,
        }
        return security_pb2.KeyRotation(**(fields | changes))


def copy_of(folder: KeyFolder, directory: Path) -> KeyFolder:
    """Copy a key folder, as an operator does for another replica."""
    shutil.copytree(folder.directory, directory)
    return replace(folder, directory=directory)


def everything_stored(database: Database) -> bytes:
    """Return all rows of all tables as text, to look for secrets in."""
    parts: list[bytes] = []
    with database.read() as session:
        for table in AuditLog.metadata.sorted_tables:
            parts.extend(_texts(session, table))
    return b"\n".join(parts)


def _texts(session: Session, table: Any) -> list[bytes]:
    return [
        value if isinstance(value, bytes) else str(value).encode()
        for row in session.execute(select(table))
        for value in row
    ]
