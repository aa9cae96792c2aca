"""Coordinators without their network, with keys of their own or one fixed key, on each of the two databases."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from qflare.crypto.signing import Algorithm, Provider, PublicKey, SigningKey
from qflare_server.config import ServerConfig
from qflare_server.keys import KeyFolder
from qflare_server.keys.setup import initialize
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from tests.conftest import START, FakeClock
from tests.support.identity import CHEAP, Coordinator, SimulatedDevice, copy_of
from tests.support.use_cases import CoordinatorHarness

FIXED_SEED = bytes(range(32))

MakeCore = Callable[..., CoordinatorHarness]


@pytest.fixture(scope="session")
def first_key_folder(tmp_path_factory: pytest.TempPathFactory) -> KeyFolder:
    """Return keys that tests copy."""
    folder = KeyFolder(tmp_path_factory.mktemp("keys") / "keys", cost=CHEAP)
    initialize(folder, "qflare", START)
    return folder


@pytest.fixture
def key_folder(first_key_folder: KeyFolder, server_config: ServerConfig) -> KeyFolder:
    """Return keys of the test's own, where its configuration expects them."""
    return copy_of(first_key_folder, server_config.data_dir / "keys")


@pytest.fixture
def coordinator(
    server_config: ServerConfig, database: Database, clock: FakeClock, key_folder: KeyFolder
) -> Coordinator:
    """Return a coordinator's use cases around identity."""
    return Coordinator.open(
        replace(server_config, key_dir=Path(key_folder.directory)), database, clock
    )


@pytest.fixture
def device(coordinator: Coordinator) -> SimulatedDevice:
    """Return an enrolled device."""
    made = SimulatedDevice()
    made.enroll(coordinator)
    return made


@pytest.fixture(scope="session")
def signing_key() -> SigningKey:
    """Return the one key of a coordinator under test, the same on every run."""
    public = MLDSA65PrivateKey.from_seed_bytes(FIXED_SEED).public_key().public_bytes_raw()
    return SigningKey(PublicKey(Algorithm.ML_DSA_65, public), Provider.CRYPTOGRAPHY, FIXED_SEED)


@pytest.fixture
def unsigned_config(server_config: ServerConfig) -> ServerConfig:
    """Return settings under which devices need not sign."""
    return replace(server_config, require_signatures=False)


@pytest.fixture
def make_core(
    unsigned_config: ServerConfig, clock: FakeClock, signing_key: SigningKey
) -> Iterator[MakeCore]:
    """Return a function that makes a coordinator with connections of its own, as a process would."""
    cores: list[CoordinatorHarness] = []

    def make(**settings: Any) -> CoordinatorHarness:
        name = settings.pop("name", f"core-{len(cores)}")
        parts = {part: settings.pop(part, None) for part in ("signer", "store")}
        config = replace(unsigned_config, **settings)
        core = CoordinatorHarness(
            config, Database(make_engine(config)), clock, signing_key, name=name, **parts
        )
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.close()
        core.database.close()


@pytest.fixture
def core(make_core: MakeCore) -> CoordinatorHarness:
    """Return a coordinator with four devices."""
    made = make_core()
    made.add_devices(4)
    return made


@pytest.fixture
def large(make_core: MakeCore) -> CoordinatorHarness:
    """Return a coordinator with four devices that puts every payload into the payload store."""
    made = make_core(inline_payload_bytes=0, upload_batch_bytes=2**20)
    made.add_devices(4)
    return made
