"""Enrolled devices and their tokens, written into the database at once.

Enrolling a thousand devices over the network would take longer than what is measured with them; that path has a row of
its own. The keys are real, and so is every signature made with them.
"""

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from qflare.crypto.signing import SigningKey
from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys import ServerKeys
from qflare_server.storage.database import Database
from qflare_server.storage.tables import Device, DeviceKey, DeviceState, TokenKind, UserToken
from qflare_server.use_cases.access.authentication import mint_secret
from qflare_server.use_cases.access.roles import ADMINISTRATIVE

TOKEN_LIFE = timedelta(days=1)


@dataclass(frozen=True)
class BenchDevice:
    """An enrolled device with an access token."""

    device_id: str
    token: str = field(repr=False)
    key: SigningKey = field(repr=False)


class Population:
    """The devices of one coordinator."""

    def __init__(self, database: Database, config: ServerConfig) -> None:
        self._config = config
        self.database = database
        """Its database, for what has to be written or read past it."""
        self._devices: list[BenchDevice] = []

    def devices(self, count: int) -> list[BenchDevice]:
        """Return so many devices, enrolling those that are missing."""
        missing = count - len(self._devices)
        if missing > 0:
            self._add(missing)
        return self._devices[:count]

    def _add(self, count: int) -> None:
        now = datetime.now(UTC)
        registrar = ServerKeys.load(self._config, self.database, utc_now)
        devices: list[dict[str, Any]] = []
        keys: list[dict[str, Any]] = []
        tokens: list[dict[str, Any]] = []
        for _ in range(count):
            device_id, key = str(uuid.uuid4()), SigningKey.generate()
            token_row, secret = _token(TokenKind.ACCESS, device_id, now)
            self._devices.append(BenchDevice(device_id, secret, key))
            devices.append(_device(device_id, key, now))
            keys.append(_key(registrar, device_id, key, now))
            tokens.append({**token_row, "device_id": device_id})

        def work(session: Session) -> None:
            session.execute(insert(Device), devices)
            session.execute(insert(DeviceKey), keys)
            session.execute(insert(UserToken), tokens)

        self.database.write(work)

    def add_administrator(self) -> str:
        """Return the token of an administrator with every role."""
        row, secret = _token(TokenKind.ADMIN, "bench", datetime.now(UTC))
        self._insert_tokens([{**row, "roles": sorted(ADMINISTRATIVE)}])
        return secret

    def enrollment_tokens(self, count: int) -> list[str]:
        """Return so many one-time rights to enroll."""
        issued = [
            _token(TokenKind.ENROLLMENT, "bench", datetime.now(UTC), "qfe1") for _ in range(count)
        ]
        self._insert_tokens([row for row, _ in issued])
        return [secret for _, secret in issued]

    def _insert_tokens(self, rows: list[dict[str, Any]]) -> None:
        def work(session: Session) -> None:
            session.execute(insert(UserToken), rows)

        self.database.write(work)


def _token(
    kind: TokenKind, subject: str, now: datetime, prefix: str = "bench"
) -> tuple[dict[str, Any], str]:
    token_id, secret, digest = mint_secret(prefix)
    row: dict[str, Any] = {
        "id": token_id,
        "token_hash": digest,
        "kind": kind.value,
        "subject": subject,
        "roles": [],
        "created_at": now,
        "expires_at": now + TOKEN_LIFE,
    }
    return row, secret


def _device(device_id: str, key: SigningKey, now: datetime) -> dict[str, Any]:
    return {
        "id": device_id,
        "name": f"bench-{device_id}",
        "state": DeviceState.ACTIVE.value,
        "device_type": "bench",
        "hardware_info": {},
        "network_info": {},
        "capabilities": {"ram_mib": 4096},
        "signature_algorithm": int(key.public.algorithm),
        "signature_public_key": key.public.data,
        "signature_key_id": key.public.key_id,
        "registered_at": now,
    }


def _key(registrar: ServerKeys, device_id: str, key: SigningKey, now: datetime) -> dict[str, Any]:
    receipt = security_pb2.EnrollmentReceipt(
        realm=registrar.realm,
        device_id=device_id,
        signature_key_id=key.public.key_id,
        in_process=True,
    )
    signed = registrar.sign(
        security_pb2.KEY_ROLE_REGISTRAR, receipt.SerializeToString(deterministic=True)
    )
    return {
        "key_id": key.public.key_id,
        "device_id": device_id,
        "sequence": 1,
        "algorithm": int(key.public.algorithm),
        "public_key": key.public.data,
        "statement": signed.SerializeToString(),
        "created_at": now,
    }
