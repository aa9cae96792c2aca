"""A real coordinator on a free port, real enrolled devices, and a raw device that sends whatever it likes."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from qflare.tensors import Manifest, chunks
from qflare.v1 import (
    admin_service_pb2 as admin_pb2,
)
from qflare.v1 import (
    admin_service_pb2_grpc,
    coordinator_service_pb2_grpc,
    security_pb2,
    training_pb2,
)
from qflare_client import Client, enroll
from qflare_server.config import ServerConfig
from qflare_server.context import Telemetry, utc_now
from qflare_server.keys import ensure_initialized
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import bootstrap_bundle, initialize
from qflare_server.serving.application import Application
from qflare_server.serving.coordinator import Coordinator
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from tests.support.processes import Replicas
from tests.support.use_cases import with_quorum

CHEAP = Cost(iterations=1, memory_kib=1024, lanes=1)
"""Cost of the files of keys that tests write: the cost that is right for secrets takes a second for each file."""


class Deployment:
    """One running coordinator, with an administrator's stub and as many devices as a test wants."""

    def __init__(
        self, config: ServerConfig, folder: Path, telemetry: Telemetry | None = None
    ) -> None:
        ensure_initialized(config)
        self.folder = folder
        self.config = config
        self.coordinator = Coordinator(config, telemetry=telemetry)
        self.coordinator.start()
        self.channel = grpc.insecure_channel(self.coordinator.address)
        self.admin_token = self.issue_admin(Role.ADMIN, Role.AUDITOR)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)
        self.devices_stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(self.channel)
        self._clients: list[Client] = []

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The administrator's credential."""
        return (("authorization", f"Bearer {self.admin_token}"),)

    def issue_admin(self, *roles: Role) -> str:
        """Return an admin token with these roles."""
        tokens = self.coordinator.use_cases.tokens
        return tokens.issue_admin(Caller(), "tester", list(roles)).secret

    def bundle(self, groups: Sequence[str] = (), label: str = "") -> security_pb2.BootstrapBundle:
        """Return a bootstrap bundle with a fresh enrollment token, which puts a device into groups and names it."""
        tokens = self.coordinator.use_cases.tokens
        issued = tokens.issue_enrollment(Caller(), groups=groups, label=label)[0]
        return bootstrap_bundle(
            self.coordinator.parts.keys.trust,
            self.coordinator.address,
            enrollment_token=issued.secret,
        )

    def device(
        self, name: str, groups: Sequence[str] = (), *, label: str = "", **enrollment: Any
    ) -> Client:
        """Enroll a device and return its client."""
        home = self.folder / name
        enroll(self.bundle(groups, label or name), home=home, **enrollment)
        client = Client(home=home)
        self._clients.append(client)
        return client

    def session(
        self,
        arrays: dict[str, np.ndarray] | None = None,
        *,
        start: bool = True,
        **config: Any,
    ) -> str:
        """Create a training session with an initial model, start it, and return its id."""
        weights = {"w": np.zeros(4, np.float32)} if arrays is None else arrays
        wanted = with_quorum(training_pb2.TrainingConfig(**config))
        created = self.admin.CreateTrainingSession(
            admin_pb2.CreateTrainingSessionRequest(name="test", config=wanted),
            metadata=self.metadata,
        )
        session_id = created.training_session.training_session_id
        self.upload(session_id, weights)
        if start:
            self.admin.StartTrainingSession(
                admin_pb2.StartTrainingSessionRequest(training_session_id=session_id),
                metadata=self.metadata,
            )
        return session_id

    def upload(self, session_id: str, weights: dict[str, np.ndarray]) -> None:
        """Upload an initial model."""
        manifest = Manifest.from_arrays(weights)
        header = admin_pb2.InitialModelHeader(
            training_session_id=session_id, manifest=manifest.to_proto()
        )

        def messages() -> Iterator[admin_pb2.UploadInitialModelRequest]:
            yield admin_pb2.UploadInitialModelRequest(header=header)
            for index, data in enumerate(chunks(weights, manifest)):
                message = admin_pb2.UploadInitialModelRequest()
                message.chunk.index = index
                message.chunk.data = data
                yield message

        self.admin.UploadInitialModel(messages(), metadata=self.metadata)

    def close(self) -> None:
        """Stop everything."""
        for client in self._clients:
            client.close()
        self.channel.close()
        self.coordinator.stop(0.5)


@pytest.fixture(scope="session")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys that every coordinator of this run starts from: making them is slow on purpose."""
    directory = tmp_path_factory.mktemp("keys") / "keys"
    initialize(KeyFolder(directory, cost=CHEAP), "qflare", utc_now())
    return directory


@pytest.fixture
def deploy(
    database_url: str, tmp_path: Path, key_folder: Path
) -> Iterator[Callable[..., Deployment]]:
    """Return a function that starts a coordinator on the database of this test."""
    running: list[Deployment] = []
    shutil.copytree(key_folder, tmp_path / "coordinator" / "keys")

    def start(**settings: Any) -> Deployment:
        values: dict[str, Any] = {
            "data_dir": tmp_path / "coordinator",
            "database_url": database_url,
            "listen": "127.0.0.1:0",
            "database_pool_size": 8,
            **settings,
        }
        deployment = Deployment(ServerConfig(**values).checked(), tmp_path)
        running.append(deployment)
        return deployment

    yield start
    for deployment in running:
        deployment.close()


@pytest.fixture
def parts(database_url: str, tmp_path: Path, key_folder: Path) -> Iterator[Application]:
    """Yield the use cases on the test's database, whose keys are in the folder `coordinator`."""
    shutil.copytree(key_folder, tmp_path / "coordinator" / "keys")
    config = ServerConfig(
        data_dir=tmp_path / "coordinator", database_url=database_url, database_pool_size=4
    ).checked()
    open_application = Application.open(config)
    yield open_application
    open_application.close()


@pytest.fixture
def replicas(parts: Application, database_url: str) -> Iterator[Replicas]:
    """Yield what starts coordinators."""
    with ExitStack() as stack:
        yield Replicas(parts.context.config.data_dir, database_url, stack)
