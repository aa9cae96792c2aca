"""The coordinator of a simulation: every part of a real one but its network, in virtual time."""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray
from sqlalchemy.orm import Session

from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import sign_evaluation, sign_update
from qflare.tensors import Manifest, chunks
from qflare.tensors.download_encodings import widened
from qflare.tensors.encodings import Encoding
from qflare.v1 import admin_service_pb2, coordinator_service_pb2, security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.config import ServerConfig
from qflare_server.errors import QflareError
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import SetupOptions, initialize
from qflare_server.serving.application import Application, open_application
from qflare_server.serving.rpc.coordinator_service import task_response
from qflare_server.storage.records import Round, TrainingSession
from qflare_server.storage.repository import late_updates, neighbors, training_sessions
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import GroupStage, RoundState
from qflare_server.training.evaluation import find_last_measurement, find_measurement
from qflare_server.training.neighbor_stages import has_neighbors, is_awaited, next_deadline
from qflare_server.training.versions import manifest_of
from qflare_server.use_cases import build_use_cases
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices, PublicKeys
from qflare_server.use_cases.updates.submission import Contributor
from qflare_server.use_cases.updates.upload import Arrival
from qflare_simulation.clock import START, VirtualClock
from qflare_simulation.config import SimulationConfig
from qflare_simulation.errors import SimulationError
from qflare_simulation.kinds import DeviceKind
from qflare_simulation.members import signing_key
from qflare_simulation.memory import DeviceMemory, HomeFolder
from qflare_simulation.secure_aggregation import SimulatedHelpers, helper_names
from qflare_simulation.seeds import SeededBytes
from qflare_simulation.worker import (
    Brief,
    Failed,
    ModelFile,
    Trained,
    device_id,
    device_index,
)

ADMIN: Final = Caller("system", "", "simulation")
REALM: Final = ServerConfig.realm
LIFETIME: Final = timedelta(days=36_500)
"""Of the keys: a database that was simulated in an earlier time is read today."""
KEY_COST: Final = Cost(iterations=1, memory_kib=1024, lanes=1)
"""Of the key files of a simulation: their passphrases are random and beside them, and their keys protect nobody."""
MARKER: Final = "simulated"
"""File in the folder of a simulated coordinator, whose devices sign nothing."""
DEVICES: Final = "devices"
"""Folder of what devices keep between rounds, in that of the coordinator."""
HELPERS: Final = "helpers"
"""Folder of the helpers for secure aggregation, in that of the coordinator."""
REGISTERED_AT_ONCE: Final = 500
MAX_FAILURE_TEXT: Final = 200


class Groups(NamedTuple):
    """How far the groups of a round with neighbors are.

    Attributes:
        are_formed: Whether there are groups.
        advertised: Devices that have advertised.
        awaited: Stage of its group by device that the group waits for.
        next_deadline: When the next step ends for lack of time; None if none does.
    """

    are_formed: bool
    advertised: frozenset[int]
    awaited: Mapping[int, str]
    next_deadline: datetime | None


class SimulatedCoordinator:
    """A coordinator over an SQLite file, whose devices and helpers live in this program.

    Args:
        folder: Empty folder.
        seed: Of noise, nonces, ids, and the keys of devices in groups.
        is_kept: Whether the database is read after the simulation.
        helpers: Helpers for secure aggregation that the configuration names; None without helpers.
        has_neighbors: Whether devices form groups for secure aggregation.

    Attributes:
        clock: The virtual time.
        session_id: The training session, once it is created.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        is_kept: bool,
        helpers: Sequence[str] | None = None,
        has_neighbors: bool = False,
    ) -> None:
        config = ServerConfig(data_dir=folder, realm=REALM, require_signatures=False).checked()
        keys = dataclasses.replace(KeyFolder.from_config(config), cost=KEY_COST)
        if not keys.is_empty():
            raise SimulationError(f"{folder}: holds a coordinator already; choose an empty folder")
        initialize(
            keys, REALM, START, SetupOptions(keyset_lifetime=LIFETIME, root_lifetime=LIFETIME)
        )
        self.clock = VirtualClock()
        opened = Application.open(config, self.clock)
        self._helpers = None
        if helpers is not None:
            self._helpers = SimulatedHelpers(
                folder / HELPERS, helpers, opened.keys, self.clock, seed
            )
        context = dataclasses.replace(
            opened.context, draw_random=SeededBytes(seed).draw, helpers=self._helpers
        )
        use_cases = build_use_cases(context, opened.keys, opened.executor)
        self._application = dataclasses.replace(opened, context=context, use_cases=use_cases)
        self._use_cases = use_cases
        self._aggregator = Aggregator(
            context, opened.executor, "simulation", waits_for_helpers=True
        )
        (folder / MARKER).touch()
        self._folder = folder / "versions"
        self._folder.mkdir()
        self._home = folder / DEVICES
        self._home.mkdir()
        self._keys: dict[int, SigningKey] = {}
        self._seed = seed
        self._has_neighbors = has_neighbors
        self.session_id = ""
        self._size_bytes = 0
        self._is_kept = is_kept

    @property
    def application(self) -> Application:
        """The parts of the coordinator."""
        return self._application

    def register(self, config: SimulationConfig) -> None:
        """Register the devices by index: with their kinds, and with keys if they sign evaluations or masked updates.

        Raises:
            SimulationError: The coordinator refuses a kind of devices.
        """
        kinds = config.device_kinds()
        if self._has_neighbors:
            self._keys = {index: signing_key(self._seed, index) for index in range(config.devices)}
        elif config.training.evaluation.every_rounds or self._helpers is not None:
            self._keys = {index: SigningKey.generate() for index in range(config.devices)}
        known = KnownDevices(self._application.context)
        try:
            for start in range(0, config.devices, REGISTERED_AT_ONCE):
                indices = range(start, min(config.devices, start + REGISTERED_AT_ONCE))
                known.add_many(ADMIN, [self._known(index, kinds[index]) for index in indices])
            for index, kind in enumerate(kinds):
                if kind.groups:
                    name = device_id(index)
                    self._use_cases.devices.set_groups(ADMIN, name, kind.groups, "simulated")
        except QflareError as error:
            raise SimulationError(f"simulation.kinds: {error}") from error

    def _known(self, index: int, kind: DeviceKind) -> KnownDevice:
        key = self._keys.get(index)
        keys = PublicKeys() if key is None else PublicKeys(key.public)
        profile = Profile(kind.device_type, capabilities=dict(kind.capabilities))
        return KnownDevice(device_id(index), profile, keys)

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
                config=self._session_config(config),
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

    def _session_config(self, config: SimulationConfig) -> training_pb2.TrainingConfig:
        """Return the settings of the training session, with helpers that are here."""
        settings = config.session_config()
        if self._helpers is not None:
            policy = settings.secure_aggregation
            policy.helpers[:] = self._helpers.stand_for(policy.helpers)
        return settings

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

    def record_late(self, late: Sequence[tuple[int, int]]) -> None:
        """Count devices, each with the number of its round, whose updates came after their rounds had closed."""
        at = self.clock()

        def work(session: Session) -> None:
            for index, round_number in late:
                named = self.session_id, round_number
                training_sessions.lock_round(session, *named)
                late_updates.record_late(session, *named, device_id(index), at)

        if late:
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
        registrars: tuple[tuple[int, bytes], ...] = ()
        if self._has_neighbors:
            keys = self._application.keys.registrar_keys()
            registrars = tuple((int(key.algorithm), key.data) for key in keys)
        return Brief(envelope.payload, ModelFile(str(path)), manifest, registrars)

    def groups(self, owner: TrainingSession, current: Round) -> Groups:
        """Return how far the groups of a round with neighbors are."""
        key = self.session_id, current.number
        with self._application.database.read() as session:
            groups = neighbors.groups_of(session, *key)
            members = neighbors.members_of(session, *key)
            updated = neighbors.update_digests(session, *key)
        stages = {group.number: group.stage for group in groups}
        if current.state != RoundState.OPEN.value:  # no update comes any more
            stages = {each: at for each, at in stages.items() if at != GroupStage.TRAIN.value}
        awaited = {
            device_index(member.device_id): stages[member.group_number]
            for member in members
            if member.group_number in stages
            and is_awaited(member, stages[member.group_number], updated)
        }
        return Groups(
            are_formed=bool(groups),
            advertised=frozenset(device_index(member.device_id) for member in members),
            awaited=awaited,
            next_deadline=next_deadline(owner.config, current, groups, self.clock()),
        )

    def shown(self, index: int) -> coordinator_service_pb2.GetTaskResponse:
        """Return what a device is shown when it polls, with all its neighbors."""
        answer = self._polled(index, 0)
        shown = answer.neighbors
        while shown.members:
            more = self._polled(index, len(shown.members)).neighbors
            if not more.members:
                break
            shown.members.extend(more.members)
            shown.earlier_keysets.extend(more.earlier_keysets)
        return answer

    def _polled(self, index: int, first_member: int) -> coordinator_service_pb2.GetTaskResponse:
        found = self._use_cases.tasks.next_task(
            device_id(index),
            self.session_id,
            trains_only=True,
            answers_queries=True,
            first_member=first_member,
        )
        return task_response(found)

    def take_step(
        self, index: int, request: coordinator_service_pb2.SecureAggregationStepRequest
    ) -> None:
        """Take what a device sends for a step of a round with neighbors.

        Raises:
            QflareError: It is refused.
        """
        self._use_cases.neighbor_steps.take(self._contributor(index), request)

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

    def version_brief(self, version: int, *, as_devices_get_it: bool = False) -> Brief:
        """Return what it takes to evaluate a version.

        Args:
            version: The version.
            as_devices_get_it: In the encoding in which devices download versions, instead of full precision.
        """
        found = self._use_cases.deliveries.find(self.session_id, version)
        with self._application.database.read() as session:
            owner = training_sessions.get_session(session, self.session_id)
        assert owner is not None
        transfer = owner.config.transfer
        encoding = Encoding.FULL_PRECISION
        if as_devices_get_it:
            encoding = Encoding.from_number(transfer.download_encoding)
        path, manifest = self.download(version, encoding)
        statement = security_pb2.TaskStatement(
            realm=REALM,
            training_session_id=self.session_id,
            base_version=version,
            base_digest=found.model.digest,
            transfer=transfer,
        )
        payload = statement.SerializeToString(deterministic=True)
        return Brief(payload, ModelFile(str(path)), manifest)

    def evaluations(
        self, devices: Iterable[int], version: int, *, is_last: bool
    ) -> list[tuple[int, str]]:
        """Return which of these devices are to measure a version, each with the nonce of its evaluation.

        Args:
            devices: Indices.
            version: The version.
            is_last: Whether the training session has ended with it.
        """
        context, asked = self._application.context, []
        with self._application.database.read() as session:
            owner = training_sessions.get_session(session, self.session_id)
            assert owner is not None
            for index in devices:
                name = device_id(index)
                if is_last:
                    task = find_last_measurement(context, session, owner, name, self.clock())
                else:
                    task = find_measurement(context, session, owner, version, name)
                if task is not None:
                    asked.append((index, task.nonce))
        return asked

    def report_evaluation(self, index: int, statement: security_pb2.EvaluationStatement) -> None:
        """Sign a device's evaluation and report it.

        Raises:
            SimulationError: The coordinator refuses it.
        """
        key, contributor = self._keys[index], self._contributor(index)
        statement.key_id = key.public.key_id
        caller = Caller(f"device:{contributor.device_id}", "", "simulation")
        try:
            self._use_cases.evaluations.report(caller, contributor, sign_evaluation(key, statement))
        except QflareError as error:
            raise SimulationError(f"the coordinator refuses an evaluation: {error}") from error

    def keep(self, index: int, update_id: str) -> None:
        """Let what a device staged with an update take effect, because the update was accepted."""
        DeviceMemory(HomeFolder(self._home), index).accept(update_id)

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
        arrivals = [self._arrival(*update) for update in updates]
        return self._use_cases.uploads.submit_all(arrivals)

    def _arrival(self, index: int, update: Trained) -> Arrival:
        """Return an update as it arrives: signed if helpers or neighbors have to verify it."""
        contributor = Contributor(device_id(index), None)
        envelope = security_pb2.SignedEnvelope(payload=update.statement)
        if self._helpers is not None or self._has_neighbors:
            contributor = self._contributor(index)
            statement = security_pb2.UpdateStatement.FromString(update.statement)
            statement.key_id = self._keys[index].public.key_id
            envelope = sign_update(self._keys[index], statement)
        header = coordinator_service_pb2.UpdateHeader(
            statement=envelope, chunk_digests=update.chunk_digests
        )
        return Arrival(ADMIN, contributor, header, update.chunks)

    def _contributor(self, index: int) -> Contributor:
        """Return a device that has a key."""
        public = self._keys[index].public
        return Contributor(device_id(index), public.key_id, public.algorithm, public.data)

    def report_failure(self, index: int, round_number: int, failed: Failed) -> None:
        """Report a failed training, as the device SDK does."""
        last = failed.text.strip().splitlines()[-1:] or [""]
        text = "".join(mark if mark.isprintable() else " " for mark in last[0][:MAX_FAILURE_TEXT])
        name = device_id(index)
        caller = Caller(f"device:{name}", "", "simulation")
        self._use_cases.failures.report(
            caller, name, self.session_id, round_number, kind=failed.kind, text=text
        )

    def aggregate(self) -> bool:
        """Do all that an aggregation worker does at this time; return whether there was anything."""
        has_worked = False
        while self._aggregator.run_once():
            has_worked = True
        return has_worked

    def cancel(self, reason: str) -> None:
        """Cancel the training session."""
        self._use_cases.training.cancel(ADMIN, self.session_id, reason)

    def close(self) -> None:
        """Complete the audit log of a database that is kept, and close every part."""
        shutil.rmtree(self._home, ignore_errors=True)
        if self._is_kept:
            AuditSequencer(self._application.context).run_once()
        self._aggregator.close()
        self._application.close()


@contextmanager
def opened(
    folder: Path, config: SimulationConfig, *, is_kept: bool
) -> Iterator[SimulatedCoordinator]:
    """Open a coordinator in an empty folder, with the helpers that a configuration needs, and close it afterwards."""
    coordinator = SimulatedCoordinator(
        folder,
        config.seed,
        is_kept=is_kept,
        helpers=helper_names(config.training),
        has_neighbors=has_neighbors(config.training),
    )
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
