"""Keys inserted into the database of a coordinator behind its back."""

from typing import Any

from sqlalchemy import update

from qflare.crypto.signing import SigningKey
from qflare_server.storage.epochs import bump_security
from qflare_server.storage.repository import devices
from qflare_server.storage.tables import Device, DeviceKey
from tests.support.raw_device import RawDevice


def exchange_key(deployment: Any, device: RawDevice, statement: bytes | None) -> SigningKey:
    """Insert a key for a device that is logged in, and make it the one in use."""
    key = SigningKey.generate()
    public, device_id = key.public, device.identity.device_id
    row = DeviceKey(
        key_id=public.key_id,
        device_id=device_id,
        sequence=_next_sequence(deployment, device_id),
        algorithm=int(public.algorithm),
        public_key=public.data,
        statement=statement,
        created_at=deployment.coordinator.parts.context.clock(),
    )
    columns = {
        "signature_algorithm": int(public.algorithm),
        "signature_public_key": public.data,
        "signature_key_id": public.key_id,
    }

    def work(session: Any) -> None:
        session.add(row)
        session.execute(update(Device).where(Device.id == device_id).values(**columns))
        bump_security(session)  # the next call goes by the new rows

    deployment.coordinator.parts.context.database.write(work)
    return key


def _next_sequence(deployment: Any, device_id: str) -> int:
    with deployment.coordinator.parts.context.database.read() as session:
        return devices.last_sequence(session, device_id) + 1


def receipt_of(deployment: Any, device_id: str) -> bytes:
    with deployment.coordinator.parts.context.database.read() as session:
        row = session.query(DeviceKey).filter_by(device_id=device_id, sequence=1).one()
        assert row.statement is not None
        return bytes(row.statement)
