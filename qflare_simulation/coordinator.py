"""The coordinator of a simulation: every part of a real one but its network, in virtual time."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray
from sqlalchemy.orm import Session

from qflare.tensors import Manifest, chunks
from qflare.tensors.download_encodings import widened
from qflare.tensors.encodings import Encoding
from qflare.v1 import admin_service_pb2, coordinator_service_pb2, security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.config import ServerConfig
from qflare_server.errors import QflareError
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.setup import SetupOptions, initialize
from qflare_server.serving.application import Application, open_application
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import late_updates, training_sessions
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.training.versions import manifest_of
from qflare_server.use_cases import build_use_cases
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices
from qflare_server.use_cases.updates.submission import Contributor
from qflare_server.use_cases.updates.upload import Arrival
from qflare_simulation.clock import START, VirtualClock
from qflare_simulation.config import SimulationConfig
from qflare_simulation.errors import SimulationError
from qflare_simulation.worker import Brief, Failed, Trained, device_id

ADMIN: Final = Caller("system", "", "simulation")
REALM: Final = ServerConfig.realm
LIFETIME: Final = timedelta(days=36_500)
"""Of the keys: a database that was simulated in an earlier time is read today."""
MARKER: Final = "simulated"
"""File in the folder of a simulated coordinator, whose devices sign nothing."""
REGISTERED_AT_ONCE: Final = 500
MAX_FAILURE_TEXT: Final = 200


class SimulatedCoordinator:
    """A coordinator over an SQLite file, whose devices live in this program.

    Attributes:
        clock: The virtual time.
        session_id: The training session, once it is created.
    """

    def __init__(self, folder: Path, seed: int, *, is_kept: bool) -> None:
        config = ServerConfig(data_dir=folder, realm=REALM, require_signatures=False).checked()
        keys = KeyFolder.from_config(config)
        if not keys.is_empty():
            raise SimulationError(f"{folder}: holds a coordinator already; choose an empty folder")
        initialize(
            keys, REALM, START, SetupOptions(keyset_lifetime=LIFETIME, root_lifetime=LIFETIME)
        )
        self.clock = VirtualClock()
        opened = Application.open(config, self.clock)
        context = dataclasses.replace(opened.context, draw_random=_SeededBytes(seed).draw)
        use_cases = build_use_cases(context, opened.keys, opened.executor)
        self._application = dataclasses.replace(opened, context=context, use_cases=use_cases)
        self._use_cases = use_cases
        self._aggregator = Aggregator(context, opened.executor, "simulation")
        (folder / MARKER).touch()
        self._folder = folder / "versions"
        self._folder.mkdir()
        self.session_id = ""
        self._size_bytes = 0
        self._is_kept = is_kept

    @property
    def application(self) -> Application:
        """The parts of the coordinator."""
        return self._application

    def register(self, count: int) -> None:
        """Register devices by index."""
        known = KnownDevices(self._application.context)
        for start in range(0, count, REGISTERED_AT_ONCE):
            indices = range(start, min(count, start + REGISTERED_AT_ONCE))
            known.add_many(ADMIN, [KnownDevice(device_id(index), Profile()) for index in indices])

    def create(self, config: SimulationConfig, model: Mapping[str, NDArray[Any]]) -> None:
        """Create the training session with its first model, and start it.

        Raises:
            SimulationError: The coordinator refuses the configuration or the model.
        """
        try:
            created = self._use_cases.training.create(
                ADMIN,
                name=config.name,
                model_type="",
                architecture={},
                config=config.session_config(),
            )
            self.session_id = created.id
            manifest = Manifest.from_arrays(model)
            header = admin_service_pb2.InitialModelHeader(
                training_session_id=created.id, manifest=manifest.to_proto()
            )
            pieces = enumerate(chunks(dict(model), manifest))
            self._use_cases.initial_models.upload(ADMIN, header, pieces)
            self._use_cases.training.start(ADMIN, created.id)
        except QflareError as error:
            raise SimulationError(
                f"the coordinator refuses the training session: {error}"
            ) from error

    def state(self) -> tuple[TrainingSession, Round]:
        """Return the training session and its current round."""
        with self._application.database.read() as session:
            owner = training_sessions.get_session(session, self.session_id)
            assert owner is not None
            current = training_sessions.get_round(session, self.session_id, owner.current_round)
            assert current is not None
            return owner, current

    def asked(self, devices: Iterable[int]) -> list[int]:
        """Return which of these devices get the task of the open round, as each learns when it polls."""
        with self._application.database.read() as session:
            asked = training_sessions.list_asked(session, self.session_id, self.clock())
        return [index for index in devices if device_id(index) in asked]

    def record_late(self, index: int, round_number: int) -> None:
        """Count a device whose update came after its round had closed."""
        named = self.session_id, round_number
        at = self.clock()

        def work(session: Session) -> None:
            training_sessions.lock_round(session, *named)
            late_updates.record_late(session, *named, device_id(index), at)

        self._application.database.write(work)

    def brief(self, current: Round) -> Brief:
        """Return the work of a round; writes its base version to a file, as devices download it."""
        with self._application.database.read() as session:
            owner = training_sessions.get_session(session, self.session_id)
        assert owner is not None
        assert current.task is not None
        encoding = Encoding.from_number(owner.config.transfer.download_encoding)
        path, manifest = self.download(current.base_version, encoding)
        envelope = security_pb2.SignedEnvelope.FromString(current.task)
        return Brief(envelope.payload, str(path), manifest)

    def download(
        self, version: int, encoding: Encoding = Encoding.FULL_PRECISION
    ) -> tuple[Path, bytes]:
        """Write a version to a file, if it is not there; return the file and the serialized layout."""
        deliveries = self._use_cases.deliveries
        delivery = deliveries.find(self.session_id, version, encoding=encoding)
        manifest = manifest_of(delivery.model)
        path = self._folder / f"{version}.{encoding.name.lower()}"
        if not path.exists():
            with path.open("wb") as file:
                pieces = (chunk for _, chunk in deliveries.chunks(delivery, 0))
                for piece in widened(manifest, encoding, pieces):
                    file.write(piece)
        return path, manifest.to_proto().SerializeToString(deterministic=True)

    def version_brief(self, version: int) -> Brief:
        """Return what it takes to evaluate a version."""
        path, manifest = self.download(version)
        statement = security_pb2.TaskStatement(
            realm=REALM, training_session_id=self.session_id, base_version=version
        )
        return Brief(statement.SerializeToString(deterministic=True), str(path), manifest)

    def size_bytes(self, version: int) -> int:
        """Return the size of a version."""
        if not self._size_bytes:
            found = self._use_cases.deliveries.find(self.session_id, version)
            self._size_bytes = found.model.size_bytes
        return self._size_bytes

    def forget(self, before: int) -> None:
        """Delete the files of versions before a version."""
        for path in self._folder.iterdir():
            if int(path.stem) < before:
                path.unlink()

    def submit(self, updates: Sequence[tuple[int, Trained]]) -> list[UpdateReceipt | QflareError]:
        """Submit updates of devices, in their order."""
        return self._use_cases.uploads.submit_all(ADMIN, [_arrival(*update) for update in updates])

    def report_failure(self, index: int, round_number: int, failed: Failed) -> None:
        """Report a failed training, as the device SDK does."""
        last = failed.text.strip().splitlines()[-1:] or [""]
        text = "".join(mark if mark.isprintable() else " " for mark in last[0][:MAX_FAILURE_TEXT])
        name = device_id(index)
        caller = Caller(f"device:{name}", "", "simulation")
        self._use_cases.failures.report(
            caller, name, self.session_id, round_number, kind=failed.kind, text=text
        )

    def aggregate(self) -> None:
        """Do all that an aggregation worker does at this time."""
        while self._aggregator.run_once():
            pass

    def cancel(self, reason: str) -> None:
        """Cancel the training session."""
        self._use_cases.training.cancel(ADMIN, self.session_id, reason)

    def close(self) -> None:
        """Complete the audit log of a database that is kept, and close every part."""
        if self._is_kept:
            AuditSequencer(self._application.context).run_once()
        self._aggregator.close()
        self._application.close()


class _SeededBytes:
    """Draws bytes that a seed decides: the noise of a simulation protects nobody."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn = 0

    def draw(self, count: int) -> bytes:
        """Return that many bytes."""
        self._drawn += 1
        return hashlib.shake_256(f"simulation:{self._seed}:{self._drawn}".encode()).digest(count)


def _arrival(index: int, update: Trained) -> Arrival:
    name = device_id(index)
    envelope = security_pb2.SignedEnvelope(payload=update.statement)
    header = coordinator_service_pb2.UpdateHeader(
        statement=envelope, chunk_digests=update.chunk_digests
    )
    return Arrival(Contributor(name, None), header, update.chunks)


@contextmanager
def opened(folder: Path, seed: int, *, is_kept: bool) -> Iterator[SimulatedCoordinator]:
    """Open a coordinator in an empty folder and close it afterwards."""
    coordinator = SimulatedCoordinator(folder, seed, is_kept=is_kept)
    try:
        yield coordinator
    finally:
        coordinator.close()


@contextmanager
def open_coordinator(
    data_dir: str | Path | None = None, database_url: str | None = None
) -> Iterator[Application]:
    """Open the parts of a coordinator, real or simulated, to read its history or to replay its rounds.

    Args:
        data_dir: Its data folder; None means that of `QFLARE_*`.
        database_url: Its database; None means that of `QFLARE_*` or of the folder.

    Raises:
        ConfigError: A setting is not valid.
        KeyStoreError: The keys cannot be read.
        SchemaError: The database has another schema, or is none.
    """
    flags = {"data_dir": data_dir and Path(data_dir), "database_url": database_url}
    config = ServerConfig.from_env(os.environ, **flags)
    if (config.data_dir / MARKER).exists():
        config = dataclasses.replace(config, require_signatures=False)
    with open_application(config) as parts:
        yield parts


def require_simulable(config: training_pb2.TrainingConfig) -> None:
    """Refuse settings that need keys of devices, or what devices keep between rounds.

    Raises:
        SimulationError: Names the setting.
    """
    if config.evaluation.every_rounds:
        raise SimulationError(
            "evaluation.every_rounds: reports of devices are signed, and virtual devices have no keys; "
            "use simulation.evaluate, which measures versions on test data"
        )
    if config.transfer.local_tensors:
        raise SimulationError(
            "transfer.local_tensors: virtual devices keep nothing between rounds; leave it out"
        )
    if config.strategy.name == "scaffold":
        raise SimulationError(
            "strategy.name: scaffold's devices keep control variates, and virtual devices keep nothing between rounds"
        )
    if config.HasField("secure_aggregation"):
        raise SimulationError(
            "secure_aggregation: masks are sealed to helpers, and a simulation has none; leave it out"
        )
