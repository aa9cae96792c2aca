"""The coordinator under test: a process of its own on a fresh database, and the way of its administrator."""

import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

import grpc
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import CHUNK_BYTES, Manifest
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare.v1.admin_service_pb2_grpc import AdminServiceStub
from qflare.v1.coordinator_service_pb2 import Chunk
from qflare_server.config import ServerConfig
from qflare_server.serving.application import open_database
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from tests.bench.load import MAX_MESSAGE_BYTES
from tests.bench.population import Population
from tests.bench.process import ServerProcess
from tests.support.postgresql import PostgresServer, fresh_database

ROUND_DEADLINE_S = 3600
PUBLISH_TIMEOUT_S = 120.0


class Backend(StrEnum):
    """Database under the coordinator."""

    SQLITE = "SQLite"
    POSTGRESQL = "PostgreSQL"


class Laboratory:
    """What all measurements of one run share: a folder, a PostgreSQL as in production, the options."""

    def __init__(self, *, quick: bool = False, full: bool = False) -> None:
        self.quick = quick
        self.full = full
        self._stack = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="qflare-bench-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def times(self, count: int, quick: int) -> int:
        """Return how often something is done: less in a quick run."""
        return quick if self.quick else count

    @functools.cached_property
    def postgres_url(self) -> str:
        """URL of a PostgreSQL whose commits wait for the disk; started when first asked for."""
        return self._stack.enter_context(PostgresServer(durable=True)).url

    @contextlib.contextmanager
    def database_url(self, backend: Backend, folder: Path) -> Iterator[str]:
        """Give the URL of a fresh database."""
        if backend is Backend.SQLITE:
            yield f"sqlite:///{folder / 'qflare.db'}"
        else:
            with fresh_database(self.postgres_url) as url:
                yield url

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """Give a folder that is deleted afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def environment(self, backend: Backend) -> Iterator[dict[str, str]]:
        """Give the settings of a coordinator on a fresh database: the defaults, but for two.

        One device may make any number of calls, and PostgreSQL is migrated at the start as SQLite is.
        """
        with self.temporary() as folder, self.database_url(backend, folder) as url:
            yield {
                "QFLARE_DATA_DIR": str(folder),
                "QFLARE_DATABASE_URL": url,
                "QFLARE_LISTEN": "127.0.0.1:0",
                "QFLARE_AUTO_MIGRATE": "true",
                "QFLARE_MAX_CALLS_PER_SECOND": "0",
            }

    @contextlib.contextmanager
    def database(self, backend: Backend) -> Iterator[Database]:
        """Give a fresh database with nobody else on it."""
        with self.environment(backend) as environment:
            database = open_database(ServerConfig.from_env(environment))
            try:
                yield database
            finally:
                database.close()

    @contextlib.contextmanager
    def coordinator(
        self,
        backend: Backend,
        settings: Mapping[str, str] | None = None,
        *,
        prepare: Callable[[Database], None] | None = None,
    ) -> Iterator["Coordinator"]:
        """Run a coordinator on a fresh database.

        Args:
            backend: Which database.
            settings: `QFLARE_*` variables that differ.
            prepare: Fills the database before the coordinator starts.
        """
        with self.environment(backend) as defaults:
            environment = {**defaults, **(settings or {})}
            config = ServerConfig.from_env(environment)
            if prepare is not None:
                database = open_database(config)
                prepare(database)
                database.close()
            arguments = ("-m", "qflare_server", "serve")
            with ServerProcess(arguments, environment, config.data_dir / "log") as process:
                yield from with_administrator(config, process)

    @contextlib.contextmanager
    def sink(self, model_bytes: int = 10_000) -> Iterator[ServerProcess]:
        """Run the server of the ceilings, with a model of this size to send."""
        arguments = ("-m", "tests.bench.sink", "--model-bytes", str(model_bytes))
        with ServerProcess(arguments, {}, self.folder / "sink.log") as process:
            yield process


def with_administrator(config: ServerConfig, process: ServerProcess) -> Iterator["Coordinator"]:
    """Yield a running coordinator with its administrator, while its database is open here."""
    database = Database(make_engine(config))
    options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)
    try:
        population = Population(database, config)
        with grpc.insecure_channel(process.address, options=options) as channel:
            admin = Administrator(channel, population.add_administrator())
            yield Coordinator(config, process, population, admin)
    finally:
        database.close()


@dataclass(frozen=True)
class Coordinator:
    """A running coordinator.

    Attributes:
        config: Its settings.
        process: The process.
        population: Its devices.
        admin: Its administrator.
    """

    config: ServerConfig
    process: ServerProcess
    population: Population
    admin: "Administrator"

    @property
    def address(self) -> str:
        """Where it serves."""
        return self.process.address


class Administrator:
    """Calls of AdminService with a token."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self.token = token
        self.stub = AdminServiceStub(channel)
        self.metadata = (("authorization", f"Bearer {token}"),)

    def start_session(
        self, manifest: Manifest, payload: bytes, config: training_pb2.TrainingConfig
    ) -> str:
        """Create a training session with an initial model, start it and return its id."""
        if not config.rounds.HasField("deadline"):
            config.rounds.deadline.CopyFrom(Duration(seconds=ROUND_DEADLINE_S))
        request = pb.CreateTrainingSessionRequest(name="bench", config=config)
        created = self.stub.CreateTrainingSession(request, metadata=self.metadata)
        session_id = created.training_session.training_session_id
        header = pb.InitialModelHeader(training_session_id=session_id, manifest=manifest.to_proto())
        self.stub.UploadInitialModel(_pieces(header, payload), metadata=self.metadata)
        start = pb.StartTrainingSessionRequest(training_session_id=session_id)
        self.stub.StartTrainingSession(start, metadata=self.metadata)
        return session_id

    def await_version(
        self,
        session_id: str,
        version: int,
        timeout_s: float = PUBLISH_TIMEOUT_S,
        every_s: float = 0.002,
    ) -> None:
        """Wait until a version is published.

        Args:
            session_id: Training session.
            version: Its version.
            timeout_s: Longest time.
            every_s: Time between two looks, each of which costs the coordinator about a millisecond of CPU.

        Raises:
            TimeoutError: It takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while self.current_version(session_id) < version:
            if time.monotonic() > deadline:
                raise TimeoutError(f"version {version} was not published")
            time.sleep(every_s)

    def current_version(self, session_id: str) -> int:
        """Return the latest version."""
        request = pb.GetTrainingSessionRequest(training_session_id=session_id)
        answer = self.stub.GetTrainingSession(request, metadata=self.metadata)
        return answer.training_session.current_version


def _pieces(
    header: pb.InitialModelHeader, payload: bytes
) -> Iterator[pb.UploadInitialModelRequest]:
    yield pb.UploadInitialModelRequest(header=header)
    view = memoryview(payload)
    for index, start in enumerate(range(0, len(payload), CHUNK_BYTES)):
        chunk = Chunk(index=index, data=bytes(view[start : start + CHUNK_BYTES]))
        yield pb.UploadInitialModelRequest(chunk=chunk)
