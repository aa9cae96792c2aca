"""A row in the database makes no key a device's: only receipts and rotations back to a registrar key do."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete, update

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import security_pb2
from qflare_server.context import UnprovenKeyError
from qflare_server.errors import InvalidRequestError, UnauthenticatedError
from qflare_server.keys import KeyFolder
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.rotation import rotate_online
from qflare_server.storage.tables import Device, DeviceKey, RiskLevel
from qflare_server.use_cases.devices.vouching import Vouching
from qflare_server.verification import verify_database
from tests.conftest import FakeClock
from tests.support.identity import ADMIN, CALLER, Coordinator, SimulatedDevice
from tests.support.use_cases import CrashingDatabase, Fuse


def execute(coordinator: Coordinator, statement: Any) -> None:
    """Change rows behind the coordinator's back."""
    coordinator.context.database.write(lambda session: session.execute(statement))


def insert_key(
    coordinator: Coordinator, device: SimulatedDevice, sequence: int, statement: bytes | None
) -> None:
    public = device.signing.public
    row = DeviceKey(
        key_id=public.key_id,
        device_id=device.device_id,
        sequence=sequence,
        algorithm=int(public.algorithm),
        public_key=public.data,
        kem_public_key=device.kem.public.data,
        statement=statement,
        created_at=coordinator.context.clock(),
    )
    coordinator.context.database.write(lambda session: session.add(row))


def set_current(coordinator: Coordinator, device: SimulatedDevice, **columns: Any) -> None:
    public = device.signing.public
    values = {
        "signature_algorithm": int(public.algorithm),
        "signature_public_key": public.data,
        "signature_key_id": public.key_id,
        "kem_public_key": device.kem.public.data,
        "kem_key_id": device.kem.public.key_id,
        **columns,
    }
    execute(coordinator, update(Device).where(Device.id == device.device_id).values(**values))


def inserted(
    coordinator: Coordinator, statement: bytes | None = None, device_id: str = ""
) -> SimulatedDevice:
    """Insert a device with its key, as whoever writes to the database can."""
    made = SimulatedDevice(device_id=device_id or str(uuid.uuid4()))
    at = coordinator.context.clock()
    row = Device(
        id=made.device_id, name=made.device_id, state="active", registered_at=at, last_seen_at=at
    )
    row.hardware_info = row.network_info = row.capabilities = {}
    coordinator.context.database.write(lambda session: session.add(row))
    insert_key(coordinator, made, 1, statement)
    set_current(coordinator, made)
    return made


def refuse_login(coordinator: Coordinator, device: SimulatedDevice) -> str:
    """Check that a login is refused and audited, and return the reason in the audit log."""
    known = len(coordinator.events("login.refused"))
    _, proof = device.proof(coordinator)
    with pytest.raises(UnauthenticatedError):
        coordinator.login.authenticate(CALLER, proof)
    event = coordinator.events("login.refused")[known]
    assert event.subject == f"device:{device.device_id}"
    return str(event.details["problem"])


def findings(coordinator: Coordinator) -> list[str]:
    report = verify_database(coordinator.context, coordinator.keys.root_key_ids, read_bytes=False)
    return [str(found) for found in report.findings if found.kind == "device_key"]


def receipt(coordinator: Coordinator, device: SimulatedDevice, key: SigningKey) -> bytes:
    """Return a receipt that any key has signed."""
    statement = security_pb2.EnrollmentReceipt(
        realm=coordinator.keys.realm,
        device_id=device.device_id,
        signature_key_id=device.signing.public.key_id,
        kem_key_id=device.kem.public.key_id,
    )
    return sign_envelope(key, SigningContext.RECEIPT, statement).SerializeToString()


def statement_of(coordinator: Coordinator, device: SimulatedDevice) -> bytes:
    with coordinator.context.database.read() as session:
        row = session.get(DeviceKey, device.signing.public.key_id)
        assert row is not None
        assert row.statement is not None
        return row.statement


def rotated(
    coordinator: Coordinator, device: SimulatedDevice, sequence_number: int = 1
) -> SimulatedDevice:
    """Exchange the keys of a device that is logged in."""
    _, grant = device.log_in(coordinator)
    principal = coordinator.authentication.admit(
        "/qflare.v1.CoordinatorService/RotateKeys", grant.access_token
    )
    following = SimulatedDevice(device_id=device.device_id)
    envelope = device.rotation(following, sequence_number, coordinator.context.clock())
    coordinator.key_rotations.rotate(CALLER, principal, envelope)
    return following


def test_an_inserted_device_cannot_log_in(coordinator: Coordinator) -> None:
    device = inserted(coordinator)

    reason = refuse_login(coordinator, device)

    assert reason.startswith("unproven key: nothing shows whose key")
    assert not coordinator.events("device.logged_in")
    assert len(findings(coordinator)) == 1


def test_a_receipt_of_another_device_proves_nothing(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    thief = inserted(coordinator, statement_of(coordinator, device))

    assert "device_id" in refuse_login(coordinator, thief)
    assert "device_id" in findings(coordinator)[0]
    device.log_in(coordinator)


def test_a_receipt_of_another_key_proves_nothing(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    """The device's own receipt, with the key in the rows exchanged for another."""
    thief = SimulatedDevice(device_id=device.device_id)
    stolen = statement_of(coordinator, device)
    insert_key(coordinator, thief, 2, stolen)
    set_current(coordinator, thief)

    assert "signature_key_id" in refuse_login(coordinator, thief)
    assert len(findings(coordinator)) == 1


def test_a_receipt_by_a_key_that_no_keyset_published_proves_nothing(
    coordinator: Coordinator,
) -> None:
    thief = inserted(coordinator)
    forged = receipt(coordinator, thief, SigningKey.generate())
    execute(coordinator, update(DeviceKey).values(statement=forged))

    assert "unproven key" in refuse_login(coordinator, thief)
    assert len(findings(coordinator)) == 1


def test_a_statement_that_cannot_be_read_proves_nothing(coordinator: Coordinator) -> None:
    assert "unproven key" in refuse_login(coordinator, inserted(coordinator, b"\xff"))


def test_another_public_key_under_the_id_of_a_proven_one_proves_nothing(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    thief = SimulatedDevice(device_id=device.device_id)
    set_current(coordinator, thief, signature_key_id=device.signing.public.key_id)

    assert "unproven key" in refuse_login(coordinator, thief)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_rotation_that_skips_or_repeats_a_number_proves_nothing(
    coordinator: Coordinator, device: SimulatedDevice, number: int
) -> None:
    """Both keys sign, but the number is not the one that follows."""
    second = rotated(coordinator, device)
    third = SimulatedDevice(device_id=device.device_id)
    skipped = second.rotation(third, number, coordinator.context.clock())
    insert_key(coordinator, third, 3, skipped.SerializeToString())
    set_current(coordinator, third)

    assert "sequence_number" in refuse_login(coordinator.replica(), third)
    assert "sequence_number" in findings(coordinator)[0]


def test_a_rotation_by_an_unproven_key_proves_nothing(coordinator: Coordinator) -> None:
    first = inserted(coordinator)
    second = SimulatedDevice(device_id=first.device_id)
    envelope = first.rotation(second, 1, coordinator.context.clock())
    insert_key(coordinator, second, 2, envelope.SerializeToString())
    set_current(coordinator, second)

    refuse_login(coordinator, second)
    assert len(findings(coordinator)) == 2


def test_a_forked_history_proves_neither_key(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    """Who steals a retired key and writes to the database can fork; nobody can tell then who is the device."""
    second = rotated(coordinator, device)
    fork = SimulatedDevice(device_id=device.device_id)
    envelope = device.rotation(fork, 1, coordinator.context.clock())
    second.log_in(coordinator)
    insert_key(coordinator, fork, 3, envelope.SerializeToString())
    set_current(coordinator, fork)

    assert "forked" in refuse_login(coordinator, fork)
    again = coordinator.replica()
    assert "forked" in refuse_login(again, fork)
    set_current(coordinator, second)
    assert "forked" in refuse_login(again, second)
    assert len(findings(coordinator)) == 2


def test_a_key_that_was_proven_stays_so_whatever_is_inserted_later(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    second = rotated(coordinator, device)
    fork = SimulatedDevice(device_id=device.device_id)
    envelope = device.rotation(fork, 1, coordinator.context.clock())
    second.log_in(coordinator)
    insert_key(coordinator, fork, 3, envelope.SerializeToString())

    second.log_in(coordinator)


def test_a_retired_key_does_not_log_in_again(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    rotated(coordinator, device)
    set_current(coordinator, device)

    assert "retired" in refuse_login(coordinator, device)


def test_a_key_without_its_history_does_not_log_in(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    execute(coordinator, delete(DeviceKey))

    assert "unproven key" in refuse_login(coordinator, device)


def test_rotations_and_enrollment_after_a_loss_are_proven(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    second = rotated(coordinator, device)
    third = rotated(coordinator, second, 2)
    third.log_in(coordinator.replica())
    replacement = SimulatedDevice()
    replacement.enroll(coordinator, coordinator.enrollment_token(device.device_id))
    fourth = rotated(coordinator, replacement, 4)

    fourth.log_in(coordinator.replica())

    assert not findings(coordinator)


def test_another_kem_key_than_the_signed_one_is_not_the_devices(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    identities = coordinator.context.identities
    identities.require(device.device_id, device.kem.public.key_id)
    stranger = SimulatedDevice()

    with pytest.raises(UnprovenKeyError):
        identities.require(device.device_id, stranger.kem.public.key_id)
    values = {"kem_public_key": stranger.kem.public.data}
    execute(coordinator, update(DeviceKey).values(**values))
    with pytest.raises(UnprovenKeyError, match="kem_public_key"):
        coordinator.replica().context.identities.require(
            device.device_id, device.signing.public.key_id
        )


def test_receipts_of_earlier_and_of_new_registrar_keys_count(
    coordinator: Coordinator, device: SimulatedDevice, key_folder: KeyFolder, clock: FakeClock
) -> None:
    other = coordinator.replica()
    rotate_online(key_folder, coordinator.context.database, clock())
    later = coordinator.replica()
    enrolled = SimulatedDevice()
    enrolled.enroll(later)

    enrolled.log_in(other)  # at once: it looks for the keyset that it does not know
    device.log_in(later)


class CountingIdentities:
    """Identities over a database whose transactions are counted."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.fuse = Fuse()
        database = CrashingDatabase(coordinator.context.database, self.fuse)
        self.identities = DeviceIdentities(database, coordinator.keys.realm, coordinator.keys)


def test_a_key_costs_its_proof_once(coordinator: Coordinator, device: SimulatedDevice) -> None:
    second = rotated(coordinator, device)
    counting = CountingIdentities(coordinator)

    for _ in range(3):
        counting.identities.require(device.device_id, second.signing.public.key_id)
        counting.identities.require(device.device_id, device.signing.public.key_id)
        counting.identities.require(device.device_id, second.kem.public.key_id)

    assert counting.fuse.count == 1


def test_many_keys_are_proven_together(coordinator: Coordinator, device: SimulatedDevice) -> None:
    others = [SimulatedDevice() for _ in range(3)]
    for other in others:
        other.enroll(coordinator)
    thief = inserted(coordinator)
    counting = CountingIdentities(coordinator)
    named = [(each.device_id, each.signing.public.key_id) for each in (device, *others, thief)]

    problems = counting.identities.problems(named)

    assert set(problems) == {named[-1]}
    assert counting.fuse.count == 1


class TestVouching:
    """Keys that a program brought in before such keys got receipts."""

    def test_a_key_that_is_vouched_for_logs_in(self, coordinator: Coordinator) -> None:
        device, other = inserted(coordinator), inserted(coordinator)
        vouching = Vouching(coordinator.context)
        assert len(vouching.unvouched()) == 2

        assert vouching.vouch(ADMIN, [device.signing.public.key_id]) == 1

        device.log_in(coordinator)
        refuse_login(coordinator, other)
        (left,) = vouching.unvouched()
        assert left.key_id == other.signing.public.key_id
        (event,) = coordinator.events("device.key_vouched")
        assert event.subject == f"device:{device.device_id}"
        assert event.risk_level == RiskLevel.HIGH.value
        assert event.details["signature_key_id"] == device.signing.public.key_id
        assert len(findings(coordinator)) == 1

    def test_a_whole_history_is_vouched_for(self, coordinator: Coordinator) -> None:
        first = inserted(coordinator)
        second = SimulatedDevice(device_id=first.device_id)
        insert_key(coordinator, second, 2, None)
        set_current(coordinator, second, key_rotation_count=1)

        keys = [each.signing.public.key_id for each in (first, second)]
        assert Vouching(coordinator.context).vouch(ADMIN, keys) == 2

        second.log_in(coordinator)
        third = rotated(coordinator, second, 2)
        third.log_in(coordinator.replica())
        assert not findings(coordinator)

    def test_a_key_with_a_receipt_stays_as_it_is(
        self, coordinator: Coordinator, device: SimulatedDevice
    ) -> None:
        known = statement_of(coordinator, device)

        assert Vouching(coordinator.context).vouch(ADMIN, [device.signing.public.key_id]) == 0

        assert statement_of(coordinator, device) == known
        assert not coordinator.events("device.key_vouched")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda _key_id: delete(DeviceKey),
            lambda _key_id: update(DeviceKey).values(public_key=b"no key"),
            lambda _key_id: update(DeviceKey).values(public_key=SigningKey.generate().public.data),
        ],
    )
    def test_nobody_vouches_for_a_row_that_is_not_its_key(
        self, coordinator: Coordinator, spoil: Callable[[str], Any]
    ) -> None:
        key_id = inserted(coordinator).signing.public.key_id
        execute(coordinator, spoil(key_id))

        with pytest.raises(InvalidRequestError):
            Vouching(coordinator.context).vouch(ADMIN, [key_id])

        assert not coordinator.events("device.key_vouched")


def test_a_row_that_names_another_device_is_not_that_devices(
    coordinator: Coordinator, device: SimulatedDevice
) -> None:
    """Moving a proven key to another device's row gives it nothing."""
    other = SimulatedDevice()
    other.enroll(coordinator)
    key_id = device.signing.public.key_id
    values = {"device_id": other.device_id, "sequence": 2}
    execute(coordinator, update(DeviceKey).where(DeviceKey.key_id == key_id).values(**values))
    execute(
        coordinator,
        update(Device).where(Device.id == device.device_id).values(signature_key_id=None),
    )
    thief = replace(device, device_id=other.device_id)
    set_current(coordinator, thief)

    assert "unproven key" in refuse_login(coordinator, thief)
