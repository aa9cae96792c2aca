"""The in-process registry: what a program writes, administrators and devices read, and the other way round."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Algorithm, SigningKey
from qflare.v1 import security_pb2
from qflare_server import registry
from qflare_server.cli.main import main
from qflare_server.cli.registry import import_devices, read_dump
from qflare_server.config import ServerConfig
from qflare_server.errors import StoreUnavailableError
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.serving import embedded
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, Device, DeviceKey
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevices
from tests.conftest import START, FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, OneKeySigner

HOUR_S = 3600

WARD: dict[str, Any] = {
    "metadata": {
        "device_type": "workstation",
        "hardware": {"ram_mib": 8192},
        "network": {"link": "lan"},
        "capabilities": {"gpu": True, "cores": 8},
    },
    "training_config": {"local_epochs": 3, "batch_size": 64, "learning_rate": 0.5},
}


@pytest.fixture
def program(make_core: MakeCore) -> Iterator[CoordinatorHarness]:
    """A coordinator without devices whose parts the registry of this process shares."""
    core = make_core()
    registry.configure(core)
    yield core
    registry.close()


@pytest.fixture(scope="module")
def device_key() -> SigningKey:
    return SigningKey.generate(Algorithm.ML_DSA_44)


def test_registered_device_reads_back(program: CoordinatorHarness) -> None:
    assert registry.register_device("ward-3", WARD) is True

    info = registry.get_device_info("ward-3")

    assert info == {
        "device_id": "ward-3",
        "status": "active",
        "registered_at": START.isoformat(),
        "last_seen": START.isoformat(),
        "public_keys": {"kem_public_key": None, "sig_public_key": None},
        "metadata": WARD["metadata"],
        "training_config": WARD["training_config"],
        "key_rotation_count": 0,
    }
    assert json.loads(json.dumps(info)) == info
    assert program.count(Device) == 1


def test_registered_device_may_contribute_over_the_network(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3")
    training_session_id = program.start()

    assert program.submit("ward-3", training_session_id).acceptance_sequence == 1


def test_device_that_an_administrator_added_is_there(program: CoordinatorHarness) -> None:
    program.devices.add(SYSTEM, "phone-1", Profile(device_type="phone"))

    info = registry.get_device_info("phone-1")

    assert info is not None
    assert info["metadata"]["device_type"] == "phone"


def test_bare_device_gets_the_defaults(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3")

    info = registry.get_device_info("ward-3")

    assert info is not None
    assert info["metadata"] == {
        "device_type": "unknown",
        "hardware": {},
        "network": {},
        "capabilities": {},
    }
    assert info["training_config"] == {
        "local_epochs": 1,
        "batch_size": 32,
        "learning_rate": 0.01,
    }
    assert program.count(AuditLog) == 1


def test_id_that_is_taken_is_refused_and_logged(
    program: CoordinatorHarness, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register_device("ward-3", WARD)

    assert registry.register_device("ward-3") is False

    assert "ALREADY_EXISTS" in caplog.text
    assert program.devices.get("ward-3").device_type == "workstation"


@pytest.mark.parametrize(
    "info",
    [
        {"metadata": "text"},
        {"metadata": {"device_type": 3}},
        {"metadata": {"device_type": "x" * 101}},
        {"metadata": {"hardware": ["cpu"]}},
        {"metadata": {"hardware": {"cpu": float("nan")}}},
        {"metadata": {"network": {"since": object()}}},
        {"metadata": {"capabilities": {"nul\0": 1}}},
        {"training_config": {"batch_size": "many"}},
        {"training_config": {"batch_size": -1}},
        {"training_config": {"local_epochs": 2**40}},
        {"training_config": {"learning_rate": float("inf")}},
        {"registered_at": "yesterday"},
    ],
)
def test_information_that_is_not_valid_is_refused(
    program: CoordinatorHarness, info: dict[str, Any]
) -> None:
    assert registry.register_device("ward-3", info) is False

    assert program.count(Device) == 0


@pytest.mark.parametrize("device_id", ["", "x" * 256, "line\nbreak", None, 7])
def test_id_that_is_no_name_is_refused(program: CoordinatorHarness, device_id: Any) -> None:
    assert registry.register_device(device_id) is False

    assert program.count(Device) == 0


def test_capabilities_may_be_a_list(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3", {"metadata": {"capabilities": ["gpu", "avx"]}})

    assert registry.get_device_capabilities() == {"ward-3": ["avx", "gpu"]}
    assert program.devices.get("ward-3").capabilities == {"gpu": True, "avx": True}


def test_unknown_device_has_no_information(program: CoordinatorHarness) -> None:
    assert registry.get_device_info("nobody") is None
    assert program.count(Device) == 0


# Keys


@pytest.mark.parametrize("form", [bytes, bytes.hex, lambda data: base64.b64encode(data).decode()])
def test_keys_may_be_bytes_hex_or_base64(
    program: CoordinatorHarness, device_key: SigningKey, form: Any
) -> None:
    kem = KemKey.generate().public
    keys = {"sig_public_key": form(device_key.public.data), "kem_public_key": form(kem.data)}

    assert registry.register_device("ward-3", {"public_keys": keys}) is True

    device = program.devices.get("ward-3")
    assert device.signature_key_id == device_key.public.key_id
    assert device.kem_key_id == kem.key_id
    info = registry.get_device_info("ward-3")
    assert info is not None
    assert base64.b64decode(info["public_keys"]["kem_public_key"]) == kem.data


def test_keys_of_no_use_are_left_out_with_a_warning(
    program: CoordinatorHarness, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"sig_public_key": b"dilithium?", "kem_public_key": "not base64!"}

    assert registry.register_device("ward-3", {"public_keys": keys}) is True

    assert program.devices.get("ward-3").signature_key_id is None
    assert caplog.text.count("left out") == 2


def test_replaced_keys_count_as_a_rotation_and_leave_the_first_as_evidence(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    first = {"sig_public_key": SigningKey.generate(Algorithm.ML_DSA_44).public.data}
    registry.register_device("ward-3", {"public_keys": first})

    replaced = registry.update_device_keys("ward-3", {"sig_public_key": device_key.public.data})

    assert replaced is True
    device = program.devices.get("ward-3")
    assert (device.signature_key_id, device.key_rotation_count) == (device_key.public.key_id, 1)
    with program.database.read() as session:
        query = select(DeviceKey).where(DeviceKey.device_id == "ward-3")
        history = session.scalars(query.order_by(DeviceKey.sequence)).all()
        assert [key.sequence for key in history] == [1, 2]
        assert [key.retired_at is None for key in history] == [False, True]


def test_every_key_of_a_program_gets_a_receipt(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    """Without one, nobody would take the key for the device's: not a login, and not the worker."""
    first, kem, other = SigningKey.generate(), KemKey.generate().public, KemKey.generate().public
    registry.register_device("ward-3", {"public_keys": {"sig_public_key": first.public.data}})
    registry.update_device_keys("ward-3", {"kem_public_key": kem.data})
    registry.update_device_keys("ward-3", {"sig_public_key": device_key.public.data})
    registry.update_device_keys("ward-3", {"kem_public_key": other.data})

    proven = DeviceIdentities(program.database, program.config.realm, OneKeySigner(program.key))
    for key_id in (first.public.key_id, kem.key_id, device_key.public.key_id, other.key_id):
        proven.require("ward-3", key_id)
    with program.database.read() as session:
        for row in session.query(DeviceKey):
            envelope = security_pb2.SignedEnvelope.FromString(row.statement or b"")
            receipt = security_pb2.EnrollmentReceipt.FromString(envelope.payload)
            assert (receipt.in_process, receipt.key_rotation_count) == (True, row.sequence - 1)


def test_same_key_again_changes_nothing(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    keys = {"sig_public_key": device_key.public.data}
    registry.register_device("ward-3", {"public_keys": keys})

    assert registry.update_device_keys("ward-3", keys) is True

    assert program.devices.get("ward-3").key_rotation_count == 0


def test_key_of_another_device_is_refused(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    keys = {"sig_public_key": device_key.public.data}
    registry.register_device("ward-3", {"public_keys": keys})
    registry.register_device("ward-4")

    assert registry.update_device_keys("ward-4", keys) is False
    assert registry.register_device("ward-5", {"public_keys": keys}) is False

    assert program.count(Device) == 2
    assert program.devices.get("ward-4").signature_key_id is None


@pytest.mark.parametrize("keys", [{}, {"sig_public_key": b"short"}, {"kem_public_key": 7}])
def test_keys_that_are_none_are_refused(program: CoordinatorHarness, keys: dict[str, Any]) -> None:
    registry.register_device("ward-3")

    assert registry.update_device_keys("ward-3", keys) is False
    assert program.devices.get("ward-3").signature_key_id is None


def test_keys_of_an_unknown_or_revoked_device_are_refused(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    registry.register_device("ward-3")
    program.devices.revoke(SYSTEM, "ward-3", "")
    keys = {"sig_public_key": device_key.public.data}

    assert registry.update_device_keys("nobody", keys) is False
    assert registry.update_device_keys("ward-3", keys) is False


# States


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("active", "active"),
        ("training", "active"),
        ("inactive", "inactive"),
        ("suspended", "suspended"),
        ("revoked", "revoked"),
    ],
)
def test_status_moves_the_device(
    program: CoordinatorHarness, clock: FakeClock, status: str, state: str
) -> None:
    registry.register_device("ward-3")
    clock.advance(60)

    assert registry.update_device_status("ward-3", status) is True

    device = program.devices.get("ward-3")
    assert (device.state, device.last_seen_at) == (state, clock())


@pytest.mark.parametrize("status", ["", "dancing", "quarantined", None])
def test_status_that_stands_for_nothing_is_refused(
    program: CoordinatorHarness, status: Any
) -> None:
    registry.register_device("ward-3")

    assert registry.update_device_status("ward-3", status) is False
    assert program.devices.get("ward-3").state == "active"


def test_status_of_an_unknown_or_revoked_device_is_refused(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3")
    program.devices.revoke(SYSTEM, "ward-3", "")

    assert registry.update_device_status("nobody", "active") is False
    assert registry.update_device_status("ward-3", "active") is False


def test_removed_device_is_inactive_and_not_listed(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3")
    registry.register_device("ward-4")

    assert registry.remove_device("ward-3") is True

    assert [device["device_id"] for device in registry.list_active_devices()] == ["ward-4"]
    assert registry.get_device_count() == 1
    assert program.devices.get("ward-3").state == "inactive"


def test_unknown_device_is_not_removed(program: CoordinatorHarness) -> None:
    assert registry.remove_device("nobody") is False
    assert program.count(AuditLog) == 0


def test_devices_not_heard_of_are_cleaned_up(program: CoordinatorHarness, clock: FakeClock) -> None:
    registry.register_device("ward-3")
    registry.register_device("ward-4")
    clock.advance(25 * HOUR_S)
    registry.update_device_status("ward-4", "active")

    cleaned = registry.cleanup_inactive_devices()

    assert cleaned == {"cleaned": 1, "total": 2}
    assert program.devices.get("ward-3").state == "inactive"


def test_cleanup_of_negative_hours_is_a_mistake(program: CoordinatorHarness) -> None:
    with pytest.raises(ValueError, match="hours_threshold"):
        registry.cleanup_inactive_devices(-1)
    assert program.count(Device) == 0


# Lists and counts


def test_list_shows_what_the_earlier_registry_showed(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3", WARD)

    assert registry.list_active_devices() == [
        {
            "device_id": "ward-3",
            "last_seen": START.isoformat(),
            "device_type": "workstation",
            "capabilities": {"gpu": True, "cores": 8},
            "status": "active",
        }
    ]
    assert program.count(Device) == 1


def test_stats_count_by_state_and_type(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3", WARD)
    registry.register_device("ward-4", WARD)
    registry.register_device("phone-1")
    registry.remove_device("ward-4")

    assert registry.get_registry_stats() == {
        "total": 3,
        "active": 2,
        "inactive": 1,
        "last_updated": START.isoformat(),
        "by_type": {"workstation": 2, "unknown": 1},
    }
    assert program.count(Device) == 3


def test_health_tells_heard_of_from_silent_and_stopped(
    program: CoordinatorHarness, clock: FakeClock
) -> None:
    for name in ("fresh", "silent", "stopped"):
        registry.register_device(name)
    clock.advance(25 * HOUR_S)
    registry.update_device_status("fresh", "active")
    program.devices.suspend(SYSTEM, "stopped", "")

    assert registry.check_device_health() == {
        "total_devices": 3,
        "healthy": 1,
        "unhealthy": 1,
        "unknown": 1,
        "last_check": clock().isoformat(),
    }


# Faults


def test_fault_is_raised_and_not_hidden(program: CoordinatorHarness, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    nowhere = ServerConfig(database_url=f"sqlite:///{tmp_path / 'folder'}")
    database = Database(make_engine(nowhere))
    program.context = replace(program.context, database=database)
    registry.configure(program)

    with pytest.raises(StoreUnavailableError):
        registry.register_device("ward-3")
    with pytest.raises(StoreUnavailableError):
        registry.get_device_info("ward-3")

    database.close()


# A process that opens its own


def test_first_use_opens_what_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFLARE_DATA_DIR", str(tmp_path / "own"))
    embedded.close()

    assert registry.register_device("ward-3") is True
    first = embedded.current()
    registry.close()
    again = embedded.current()
    found = registry.get_device_info("ward-3")
    registry.close()

    assert found is not None
    assert again is not first
    assert (tmp_path / "own" / "qflare.db").exists()


def test_dump_is_imported_by_command_while_the_registry_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QFLARE_DATA_DIR", str(tmp_path / "own"))
    embedded.close()
    registry.register_device("ward-3")
    dump = tmp_path / "dump.json"
    dump.write_text(json.dumps({"ward-3": {}, "ward-4": {"public_keys": {"kem_public_key": "aa"}}}))

    first = main(["registry", "import", str(dump)])
    dump.write_text(json.dumps([{"device_id": "ward-5", "status": "dancing"}]))
    second = main(["registry", "import", str(dump)])
    found = [device["device_id"] for device in registry.list_active_devices()]
    registry.close()

    assert (first, second) == (0, 1)
    assert found == ["ward-3", "ward-4"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "imported: 1  skipped: 1  invalid: 0"
    assert lines[1].endswith("1")
    assert lines[2] == "imported: 0  skipped: 0  invalid: 1"


# The import of a dump


def imported(core: CoordinatorHarness, dump: object) -> tuple[int, int, int]:
    done = import_devices(KnownDevices(core.context), SYSTEM, read_dump(dump))
    return done.imported, done.skipped, done.invalid


def test_dump_of_a_registry_is_imported_into_another(
    program: CoordinatorHarness, make_core: MakeCore
) -> None:
    registry.register_device("ward-3", WARD)
    registry.register_device("ward-4")
    dump = json.loads(json.dumps(registry.get_registered_devices()))
    program.database.write(_forget_devices)

    counts = imported(make_core(), dump)

    assert counts == (2, 0, 0)
    assert registry.get_registered_devices() == dump


def _forget_devices(session: Any) -> None:
    session.execute(Device.__table__.delete())


def test_import_again_skips_all(program: CoordinatorHarness) -> None:
    dump: dict[str, object] = {"ward-3": WARD, "ward-4": {}}
    imported(program, dump)

    assert imported(program, dump) == (0, 2, 0)
    assert program.count(Device) == 2


def test_import_keeps_what_is_there(program: CoordinatorHarness) -> None:
    registry.register_device("ward-3", WARD)
    program.devices.suspend(SYSTEM, "ward-3", "")

    counts = imported(program, {"ward-3": {"status": "active"}, "ward-4": {}})

    assert counts == (1, 1, 0)
    assert program.devices.get("ward-3").state == "suspended"


def test_import_takes_a_list_with_states_and_times(program: CoordinatorHarness) -> None:
    dump = [
        {"device_id": "a", "status": "inactive", "registered_at": "2029-05-01T12:00:00"},
        {"device_id": "b", "status": "training", "last_seen": 1_800_000_000.5},
        {"device_id": "c", "status": "pending"},
    ]

    assert imported(program, dump) == (3, 0, 0)

    assert program.devices.get("a").registered_at.isoformat() == "2029-05-01T12:00:00+00:00"
    last_seen = program.devices.get("b").last_seen_at
    assert last_seen is not None
    assert last_seen.timestamp() == 1_800_000_000.5
    assert [program.devices.get(name).state for name in "abc"] == [
        "inactive",
        "active",
        "suspended",
    ]


def test_import_counts_what_is_invalid_and_takes_the_rest(program: CoordinatorHarness) -> None:
    dump = [
        {"device_id": "good"},
        {"device_id": "bad", "status": "dancing"},
        {"device_id": ""},
        {},
        None,
        "text",
        {"device_id": "late", "registered_at": []},
    ]

    assert imported(program, dump) == (1, 0, 6)


def test_import_of_one_key_for_two_devices_takes_the_first(
    program: CoordinatorHarness, device_key: SigningKey
) -> None:
    keys = {"public_keys": {"sig_public_key": device_key.public.data.hex()}}

    counts = imported(program, {"a": keys, "b": keys, "c": {}})

    assert counts == (2, 0, 1)


def test_import_of_more_than_one_transaction(program: CoordinatorHarness) -> None:
    dump: dict[str, Any] = {f"device-{number:04}": {} for number in range(1001)}

    assert imported(program, dump) == (1001, 0, 0)
    assert registry.get_device_count() == 1001


@pytest.mark.parametrize("dump", ["text", 7, None])
def test_dump_that_is_none_is_refused(dump: object) -> None:
    with pytest.raises(ValueError, match="registry dump"):
        read_dump(dump)
