"""A coordinator without its network: every use case over a real database, and devices that send what a test wants."""

import dataclasses
import hashlib
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealed_payloads import PayloadSealer, SealContext
from qflare.crypto.sealing import KemKey, KemPublicKey
from qflare.crypto.signing import PublicKey, SigningContext, SigningKey
from qflare.evidence.forms import check_form
from qflare.tensors import Array, Manifest, chunks, payload_digest
from qflare.v1 import admin_service_pb2, coordinator_service_pb2, security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.config import ServerConfig
from qflare_server.context import Context, StatementSigner
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.keys.signature_cache import SignatureCache
from qflare_server.serving.application import open_stores
from qflare_server.storage.database import Database
from qflare_server.storage.group_commit import Work
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.payload_store import PayloadStore
from qflare_server.storage.records import GlobalModel, ModelUpdate, Round
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.repository.updates import UpdateReceipt
from qflare_server.storage.tables import Base
from qflare_server.training.config import complete
from qflare_server.use_cases.access.presence import Presence
from qflare_server.use_cases.devices.administration import Devices, Profile
from qflare_server.use_cases.in_process.devices import KnownDevice, KnownDevices, PublicKeys
from qflare_server.use_cases.training_sessions.administration import Training
from qflare_server.use_cases.training_sessions.tasks import Tasks
from qflare_server.use_cases.updates.submission import Contributor
from qflare_server.use_cases.updates.upload import Uploads
from qflare_server.use_cases.versions.download import Deliveries
from qflare_server.use_cases.versions.initial_model import InitialModels
from tests.conftest import FakeClock

T = TypeVar("T")
Arrays = Mapping[str, Array]

CONTEXTS: Final = {
    security_pb2.KEY_ROLE_MODEL: SigningContext.MODEL,
    security_pb2.KEY_ROLE_TASK: SigningContext.TASK,
    security_pb2.KEY_ROLE_REGISTRAR: SigningContext.RECEIPT,
    security_pb2.KEY_ROLE_LOG: SigningContext.TREE_HEAD,
}


KEM_KEY: Final = KemKey.generate()
"""The session KEM key of every coordinator under test, whatever its id is said to be."""


@dataclasses.dataclass(frozen=True)
class OneKeySigner:
    """Signs with one key whatever the role."""

    key: SigningKey

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        check_form(CONTEXTS[role], payload)
        return sign_envelope(self.key, CONTEXTS[role], payload)

    def accepts(
        self, role: security_pb2.KeyRole.ValueType, envelope: security_pb2.SignedEnvelope
    ) -> bool:
        del role
        return any(signature.key_id == self.key.public.key_id for signature in envelope.signatures)

    def renew_tasks(self) -> int:
        return 0

    def registrar_keys(self, *, fresh: bool = False) -> Collection[PublicKey]:
        del fresh
        return (self.key.public,)


class CrashError(BaseException):
    """The process ends here; nothing that the coordinator has may catch it."""


class Fuse:
    """Counts steps and ends the process at one of them; 0 never does."""

    def __init__(self, at: int = 0) -> None:
        self.count = 0
        self._at = at

    def step(self) -> None:
        self.count += 1
        if self.count == self._at:
            raise CrashError


class CrashingDatabase(Database):
    """A database whose user may crash before each transaction and after each commit."""

    def __init__(self, inner: Database, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse
        self.engine = inner.engine
        self.is_sqlite = inner.is_sqlite

    @contextmanager
    def read(self) -> Iterator[Session]:
        self._fuse.step()
        with self._inner.read() as session:
            yield session

    def write(self, work: Work) -> Any:
        self._fuse.step()
        result = self._inner.write(work)
        self._fuse.step()
        return result


class CrashingStore:
    """A payload store whose user may crash before and after each write and each read."""

    def __init__(self, inner: PayloadStore, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def append(self, payload_id: str, first_index: int, chunks: Any) -> None:
        self._fuse.step()
        self._inner.append(payload_id, first_index, chunks)
        self._fuse.step()

    def complete(self, payload_id: str, size_bytes: int) -> None:
        self._fuse.step()
        self._inner.complete(payload_id, size_bytes)
        self._fuse.step()

    def replace_owner(self, before: str, after: str) -> None:
        self._fuse.step()
        self._inner.replace_owner(before, after)
        self._fuse.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, payload_id: str, first_index: int, count: int) -> list[bytes]:
        self._fuse.step()
        return self._inner.read(payload_id, first_index, count)

    def stored_count(self, payload_id: str) -> int:
        return self._inner.stored_count(payload_id)

    def delete(self, payload_ids: Any) -> None:
        self._fuse.step()
        self._inner.delete(payload_ids)
        self._fuse.step()

    def size_bytes(self) -> int:
        return self._inner.size_bytes()

    def check(self) -> None:
        self._inner.check()

    def close(self) -> None:
        self._inner.close()


@dataclasses.dataclass
class Draft:
    """An update before it is sent; a test changes what it wants."""

    device: Contributor
    statement: security_pb2.UpdateStatement
    chunks: list[tuple[int, bytes]]
    chunk_digests: bytes = b""
    signing_key: SigningKey | None = None
    sealed: security_pb2.SealedPayloadHeader | None = None

    def header(self) -> coordinator_service_pb2.UpdateHeader:
        payload = self.statement.SerializeToString(deterministic=True)
        envelope = security_pb2.SignedEnvelope(payload=payload)
        if self.signing_key is not None:
            envelope = sign_envelope(self.signing_key, SigningContext.UPDATE, payload)
        return coordinator_service_pb2.UpdateHeader(
            statement=envelope, chunk_digests=self.chunk_digests, sealed=self.sealed
        )

    def state_digests(self) -> None:
        """State the digests of the chunks where there are several; those of one chunk may be left out."""
        if len(self.chunks) > 1:
            self.chunk_digests = b"".join(merkle.leaf_hash(data) for _, data in self.chunks)

    def seal(self, recipient: KemPublicKey) -> None:
        """Seal the update, as a device does for a training session that asks for it."""
        sealer = PayloadSealer(SealContext.from_update(self.statement), self.statement.size_bytes)
        segments = list(sealer.seal(piece for _, piece in self.chunks))
        self.chunks = list(enumerate(segments))
        self.state_digests()
        self.statement.sealed = True
        self.statement.wire_digest = payload_digest(segments)
        self.statement.sealed_header_digest = hashlib.sha256(sealer.key.header).hexdigest()
        wrapped = sealer.key.wrap(recipient)
        self.sealed = security_pb2.SealedPayloadHeader(
            header=sealer.key.header, wrapped_keys=[wrapped]
        )

    @property
    def statement_digest(self) -> str:
        return hashlib.sha256(self.statement.SerializeToString(deterministic=True)).hexdigest()


class CoordinatorHarness:
    """One coordinator process without its network; two over one database are two processes."""

    def __init__(
        self,
        config: ServerConfig,
        database: Database,
        clock: FakeClock,
        key: SigningKey,
        *,
        name: str = "one",
        store: PayloadStore | None = None,
        signer: StatementSigner | None = None,
    ) -> None:
        self.config = config
        self.database = database
        self.clock = clock
        self.key = key
        self.store, others = open_stores(config, database) if store is None else (store, {})
        self.executor = ThreadPoolExecutor(4)
        self.woken = threading.Event()
        self.context = Context(
            config,
            database,
            self.store,
            OneKeySigner(key) if signer is None else signer,
            clock,
            self.woken.set,
            state_key=bytes(range(32)),
            decapsulate=lambda _key_id, encapsulation: KEM_KEY.decapsulate(encapsulation),
            signatures=SignatureCache(),
            identities=DeviceIdentities(database, config.realm, OneKeySigner(key)),
            other_stores=others,
        )
        self.devices = Devices(self.context)
        self.training = Training(self.context)
        self.initial_models = InitialModels(self.context, self.executor, self.training)
        self.uploads = Uploads(self.context, self.executor)
        self.tasks = Tasks(self.context, Presence(config, database))
        self.deliveries = Deliveries(self.context, self.executor)
        self.aggregator = Aggregator(self.context, self.executor, name)

    def close(self) -> None:
        """Close what this process has opened; the database is the test's."""
        self.executor.shutdown()
        for store in self.context.stores:
            store.close()

    def add_devices(self, count: int) -> list[str]:
        names = [f"device-{number}" for number in range(count)]
        for name in names:
            self.devices.add(SYSTEM, name, Profile())
        return names

    def add_signing_device(self, name: str, key: SigningKey) -> Contributor:
        """Add a device with a key that the coordinator has signed a receipt for; return it as its credential would."""
        known = KnownDevice(name, Profile(), PublicKeys(key.public, KemKey.generate().public))
        KnownDevices(self.context).add(SYSTEM, known)
        return Contributor(name, key.public.key_id, int(key.public.algorithm), key.public.data)

    def create(self, arrays: Arrays | None = None, **config: Any) -> str:
        """Create a training session with an initial model; return its id."""
        weights = vector(0.0) if arrays is None else arrays
        settings = with_quorum(training_pb2.TrainingConfig(**config))
        created = self.training.create(
            SYSTEM,
            name="test",
            model_type="mlp",
            architecture={},
            config=settings,
        )
        manifest = Manifest.from_arrays(weights)
        header = admin_service_pb2.InitialModelHeader(
            training_session_id=created.id, manifest=manifest.to_proto()
        )
        self.initial_models.upload(SYSTEM, header, enumerate(chunks(weights, manifest)))
        return created.id

    def start(self, arrays: Arrays | None = None, **config: Any) -> str:
        """Create a training session and start it; return its id."""
        training_session_id = self.create(arrays, **config)
        self.training.start(SYSTEM, training_session_id)
        return training_session_id

    def draft(
        self,
        device_id: str,
        training_session_id: str,
        arrays: Arrays,
        *,
        examples: int = 10,
        **metrics: float,
    ) -> Draft:
        """Return the update that a well-behaved device would send for its task."""
        task = self.tasks.next_task(device_id, training_session_id)
        assert task.round is not None
        assert task.round.task is not None
        envelope = security_pb2.SignedEnvelope.FromString(task.round.task)
        nonce = security_pb2.TaskStatement.FromString(envelope.payload).task_nonce
        manifest = Manifest.from_arrays(arrays)
        pieces = list(chunks(arrays, manifest))
        statement = security_pb2.UpdateStatement(
            realm=self.config.realm,
            training_session_id=training_session_id,
            round_number=task.round.number,
            task_nonce=nonce,
            update_id=str(uuid.uuid4()),
            device_id=device_id,
            base_version=task.round.base_version,
            base_digest=task.base_digest,
            layout_digest=manifest.layout_digest,
            size_bytes=manifest.size_bytes,
            payload_digest=payload_digest(pieces),
            wire_digest=payload_digest(pieces),
            example_count=examples,
            metrics=metrics,
        )
        draft = Draft(Contributor(device_id, None), statement, list(enumerate(pieces)))
        draft.state_digests()
        if task.config is not None and task.config.transfer.sealed:
            draft.seal(KEM_KEY.public)
        return draft

    def send(self, draft: Draft, sent: Iterable[tuple[int, bytes]] | None = None) -> UpdateReceipt:
        """Submit an update, or only some of its chunks."""
        pieces = draft.chunks if sent is None else sent
        return self.uploads.submit(SYSTEM, draft.device, draft.header(), iter(pieces))

    def submit(
        self, device_id: str, training_session_id: str, arrays: Arrays | None = None, **facts: Any
    ) -> UpdateReceipt:
        """Do a device's task."""
        weights = vector(1.0) if arrays is None else arrays
        return self.send(self.draft(device_id, training_session_id, weights, **facts))

    def settle(self) -> None:
        """Run passes until there is nothing to do."""
        while self.aggregator.run_once():
            pass

    def weights(self, training_session_id: str, version: int | None = None) -> bytes:
        """Return the bytes of a version."""
        delivery = self.deliveries.find(training_session_id, version)
        return b"".join(data for _, data in self.deliveries.chunks(delivery, 0))

    def versions(self, training_session_id: str) -> list[GlobalModel]:
        """Return every version, from 0 on."""
        return list(self.training.list_models(training_session_id, PageRequest(1000)).rows)[::-1]

    def round(self, training_session_id: str, number: int | None = None) -> Round:
        """Return a round, by default the current one."""
        rows = self.training.list_rounds(training_session_id, PageRequest(1000)).rows
        wanted = rows[0].number if number is None else number
        return next(row for row in rows if row.number == wanted)

    def updates(self, training_session_id: str, number: int) -> list[ModelUpdate]:
        """Return the updates of a round in the order of their acceptance."""
        return list(self.training.list_updates(training_session_id, number, PageRequest(1000)).rows)

    def count(self, model: type[Base]) -> int:
        """Return the number of rows of a table."""
        with self.database.read() as session:
            return session.execute(select(func.count()).select_from(model)).scalar_one()


def with_quorum(config: training_pb2.TrainingConfig) -> training_pb2.TrainingConfig:
    """Return a configuration with a quorum of one, where it states none and no number of devices either."""
    done = training_pb2.TrainingConfig()
    done.CopyFrom(config)
    rounds = done.rounds
    if not (rounds.quorum or rounds.device_count or done.selection.device_count):
        rounds.quorum = 1
    return done


def completed(config: training_pb2.TrainingConfig) -> training_pb2.TrainingConfig:
    """Return a configuration as it is stored, with the quorum of `with_quorum`."""
    return complete(with_quorum(config))


def vector(value: float, size: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    """Return one float32 tensor."""
    return {"w": np.full(size, value, np.float32)}


def floats(data: bytes) -> list[float]:
    """Return the values of a payload of float32."""
    return np.frombuffer(data, "<f4").tolist()  # type: ignore[no-any-return]
