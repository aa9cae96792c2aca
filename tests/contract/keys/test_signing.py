"""Keys sign before the transactions that need them, which then hold what was signed against what is stored."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy.orm import Session

from qflare.crypto.signing import SigningContext, SigningKey
from qflare.v1 import security_pb2, training_pb2
from qflare_server import aggregator as embedded_aggregator
from qflare_server import registry
from qflare_server.config import ServerConfig
from qflare_server.context import StatementSigner
from qflare_server.errors import ConflictError
from qflare_server.keys import KeyFolder, ServerKeys
from qflare_server.keys.ring import KeyProvider
from qflare_server.keys.rotation import rotate_online, rotate_root
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import audit, training_sessions
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.devices.enrollment import Enrollment
from qflare_server.use_cases.versions.promotion import Promotion
from tests.conftest import START, FakeClock
from tests.contract.aggregation.test_aggregation import policy
from tests.contract.conftest import MakeCore
from tests.support.identity import Coordinator, SimulatedDevice
from tests.support.signatures import SignatureWatch
from tests.support.use_cases import CoordinatorHarness, OneKeySigner

MODEL, TASK = security_pb2.KEY_ROLE_MODEL, security_pb2.KEY_ROLE_TASK
LOG = security_pb2.KEY_ROLE_LOG
WAIT_S = 20.0
RETRY = policy(2, missed_quorum_action=training_pb2.MISSED_QUORUM_ACTION_RETRY)


class SlowSigner:
    """Takes so long to sign that others write meanwhile; `meanwhile` is what they do, called with the role."""

    def __init__(self, inner: StatementSigner) -> None:
        self.meanwhile: Callable[[Any], object] = lambda _role: None
        self.roles: list[Any] = []
        self._inner = inner

    def sign(
        self, role: security_pb2.KeyRole.ValueType, payload: bytes
    ) -> security_pb2.SignedEnvelope:
        self.roles.append(role)
        self.meanwhile(role)
        return self._inner.sign(role, payload)

    def accepts(
        self, role: security_pb2.KeyRole.ValueType, envelope: security_pb2.SignedEnvelope
    ) -> bool:
        return self._inner.accepts(role, envelope)

    def renew_tasks(self) -> int:
        return self._inner.renew_tasks()


@pytest.fixture
def signer(signing_key: SigningKey) -> SlowSigner:
    return SlowSigner(OneKeySigner(signing_key))


@pytest.fixture
def core(make_core: MakeCore, signer: SlowSigner) -> CoordinatorHarness:
    """Return a coordinator with four devices whose keys are slow."""
    made = make_core(signer=signer)
    made.add_devices(4)
    return made


@pytest.fixture
def others(core: CoordinatorHarness, signer: SlowSigner) -> Iterator[None]:
    """Have another process lock and write every training session's rows whenever a key signs."""
    other = Database(make_engine(core.config))

    def write(session: Session) -> None:
        for training_session_id in stored_ids(core):
            training_sessions.lock_session(session, training_session_id)
            training_sessions.update_session(session, training_session_id, {"model_type": "x"})

    with ThreadPoolExecutor(1) as pool:
        signer.meanwhile = lambda _role: pool.submit(other.write, write).result(WAIT_S)
        yield
    other.close()


def stored_ids(core: CoordinatorHarness) -> list[str]:
    return [item.id for item in core.training.list(PageRequest(1000)).rows]


def run_round(core: CoordinatorHarness, training_session_id: str) -> None:
    """Bring a round with a target of one to its version."""
    core.submit("device-0", training_session_id)
    core.settle()


def started(core: CoordinatorHarness, signer: SlowSigner, **config: Any) -> str:
    """Start a training session and forget what was signed for it; return its id."""
    training_session_id = core.start(**{"rounds": policy(1), **config})
    signer.roles.clear()
    return training_session_id


@pytest.mark.usefixtures("others")
class TestOthersWriteMeanwhile:
    """What signs holds neither the thread that writes nor the lock on a training session."""

    def test_an_initial_model(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        training_session_id = core.create()

        assert signer.roles == [MODEL]
        assert len(core.versions(training_session_id)) == 1

    def test_a_start(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        training_session_id = core.create()
        signer.roles.clear()

        core.training.start(SYSTEM, training_session_id)

        assert signer.roles == [TASK]
        assert core.round(training_session_id).number == 1

    def test_a_round_that_makes_a_version(
        self, core: CoordinatorHarness, signer: SlowSigner
    ) -> None:
        training_session_id = started(core, signer)

        run_round(core, training_session_id)

        assert signer.roles == [MODEL, TASK]
        assert (
            core.round(training_session_id).number,
            len(core.versions(training_session_id)),
        ) == (
            2,
            2,
        )

    def test_the_last_round(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        training_session_id = started(core, signer, total_rounds=1)

        run_round(core, training_session_id)

        assert signer.roles == [MODEL]
        assert core.training.get(training_session_id).state == "completed"

    def test_a_round_that_missed_its_quorum(
        self, core: CoordinatorHarness, signer: SlowSigner, clock: FakeClock
    ) -> None:
        training_session_id = started(core, signer, rounds=RETRY)
        clock.advance(60)

        core.settle()

        assert signer.roles == [TASK]
        assert core.round(training_session_id).number == 2

    def test_a_round_that_makes_no_version(
        self, core: CoordinatorHarness, signer: SlowSigner
    ) -> None:
        safeguards = training_pb2.SafeguardPolicy(max_norm=1e-6)
        training_session_id = started(core, signer, safeguards=safeguards)

        run_round(core, training_session_id)

        assert signer.roles == [TASK]
        assert core.round(training_session_id, 1).state == "failed"
        assert core.round(training_session_id).number == 2

    def test_a_rollback(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        training_session_id = started(core, signer)
        run_round(core, training_session_id)
        signer.roles.clear()

        made = Promotion(core.context).roll_back(SYSTEM, training_session_id, 0, "")

        assert signer.roles == [MODEL, TASK]
        assert made.round is not None
        assert (made.model.version, made.round.number, made.round.base_version) == (2, 3, 2)

    def test_a_rollback_after_the_end(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        training_session_id = started(core, signer, total_rounds=1)
        run_round(core, training_session_id)
        signer.roles.clear()

        made = Promotion(core.context).roll_back(SYSTEM, training_session_id, 0, "")

        assert signer.roles == [MODEL]
        assert made.round is None

    def test_rounds_of_an_embedding_program(
        self, core: CoordinatorHarness, signer: SlowSigner
    ) -> None:
        registry.configure(core)
        try:
            registry.register_device("ward")
            data = np.ones(3, "<f4").tobytes()
            assert embedded_aggregator.store_model_update("ward", data)
            assert embedded_aggregator.clear_pending_updates()
            assert embedded_aggregator.store_model_update("ward", data)
            assert embedded_aggregator.aggregate_models(1) == data
        finally:
            registry.close()

        assert signer.roles == [MODEL, MODEL]

    def test_a_head_of_the_audit_log(self, core: CoordinatorHarness, signer: SlowSigner) -> None:
        head = AuditSequencer(core.context).head(fresh=True)

        assert signer.roles == [LOG]
        assert head.size > 0


class SlowProvider:
    """Holds keys, and takes so long to sign that others write meanwhile."""

    def __init__(self, inner: KeyProvider, meanwhile: Callable[[], object]) -> None:
        self._inner = inner
        self._meanwhile = meanwhile
        self.contexts: list[SigningContext] = []

    def public(self) -> Sequence[security_pb2.RoleKey]:
        return self._inner.public()

    def sign(self, key_id: str, context: SigningContext, message: bytes) -> bytes:
        self.contexts.append(context)
        self._meanwhile()
        return self._inner.sign(key_id, context, message)

    def decapsulate(self, key_id: str, encapsulation: bytes) -> bytes:
        return self._inner.decapsulate(key_id, encapsulation)


def test_others_write_while_an_enrollment_is_signed(
    coordinator: Coordinator, key_folder: KeyFolder, server_config: ServerConfig
) -> None:
    other = Database(make_engine(server_config))

    def write(session: Session) -> None:
        audit.record(session, SYSTEM, Event("test", "test"), START)

    provider = SlowProvider(key_folder.read_online(), lambda: other.write(write))
    context = coordinator.context
    keys = ServerKeys(
        key_folder.read_online(), context.database, context.clock, provide=lambda _ring: provider
    )
    slow = replace(coordinator, keys=keys, enrollment=Enrollment(context, keys))

    SimulatedDevice().enroll(slow)

    assert provider.contexts == [SigningContext.RECEIPT]
    assert len(coordinator.events("test")) == 1
    other.close()


@pytest.mark.usefixtures("coordinator")
def test_keysets_and_roots_are_signed_outside_transactions(
    watched_signatures: SignatureWatch,
    database: Database,
    key_folder: KeyFolder,
) -> None:
    before = watched_signatures.count

    rotate_online(key_folder, database, START)
    rotate_root(key_folder, database, START)

    assert watched_signatures.count >= before + 3
    assert watched_signatures.violations == []


def test_a_signature_in_a_transaction_is_noticed(
    watched_signatures: SignatureWatch, database: Database, signing_key: SigningKey
) -> None:
    database.write(lambda _session: signing_key.sign(SigningContext.TASK, b"task"))

    (violation,) = watched_signatures.violations
    watched_signatures.violations.clear()
    assert violation.startswith("SigningKey.sign on ")


def test_of_two_starts_at_the_same_moment_one_opens_a_round(
    core: CoordinatorHarness, signer: SlowSigner
) -> None:
    training_session_id = core.create()
    once(signer, lambda: core.training.start(SYSTEM, training_session_id))

    started = core.training.start(SYSTEM, training_session_id)

    assert (started.state, started.current_round) == ("running", 1)
    assert core.round(training_session_id).number == 1


def once(signer: SlowSigner, meanwhile: Callable[[], object]) -> None:
    """Do something else while the next signature is made."""

    def run(_role: Any) -> None:
        signer.meanwhile = lambda _role: None
        meanwhile()

    signer.meanwhile = run


def test_a_rollback_is_prepared_again_where_another_was_faster(
    core: CoordinatorHarness, signer: SlowSigner
) -> None:
    training_session_id = started(core, signer)
    run_round(core, training_session_id)
    run_round(core, training_session_id)
    promotion = Promotion(core.context)
    once(signer, lambda: promotion.roll_back(SYSTEM, training_session_id, 1, "faster"))

    made = promotion.roll_back(SYSTEM, training_session_id, 0, "")

    versions = core.versions(training_session_id)
    assert [item.rollback_version for item in versions] == [None, None, None, 1, 0]
    assert made.round is not None
    assert (made.round.number, made.round.base_version) == (5, 4)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_rollback_that_is_repeated_makes_one_version(
    core: CoordinatorHarness, signer: SlowSigner, at_once: bool
) -> None:
    training_session_id = started(core, signer)
    run_round(core, training_session_id)
    promotion = Promotion(core.context)
    if at_once:
        once(signer, lambda: promotion.roll_back(SYSTEM, training_session_id, 0, "faster"))

    first = promotion.roll_back(SYSTEM, training_session_id, 0, "")
    again = promotion.roll_back(SYSTEM, training_session_id, 0, "")

    versions = core.versions(training_session_id)
    assert [item.rollback_version for item in versions] == [None, None, 0]
    assert first.model.version == again.model.version == 2
    assert first.round is not None
    assert again.round is not None
    assert first.round.number == again.round.number


def test_a_rollback_gives_up_where_the_training_session_never_rests(
    core: CoordinatorHarness, signer: SlowSigner, make_core: MakeCore
) -> None:
    other = make_core()
    training_session_id = started(core, signer)
    run_round(core, training_session_id)
    core.aggregator.close()
    signer.meanwhile = lambda role: run_round(other, training_session_id) if role == MODEL else None

    with pytest.raises(ConflictError):
        Promotion(core.context).roll_back(SYSTEM, training_session_id, 0, "")

    versions = core.versions(training_session_id)
    assert [item.rollback_version for item in versions] == [None] * len(versions)
    assert core.round(training_session_id).state == "open"


def test_a_version_is_not_published_where_its_round_was_cancelled_meanwhile(
    core: CoordinatorHarness, signer: SlowSigner, make_core: MakeCore
) -> None:
    promotion = Promotion(make_core().context)
    training_session_id = started(core, signer)
    run_round(core, training_session_id)
    once(signer, lambda: promotion.roll_back(SYSTEM, training_session_id, 0, ""))

    run_round(core, training_session_id)
    run_round(core, training_session_id)

    versions = core.versions(training_session_id)
    assert [item.rollback_version for item in versions] == [None, None, 0, None]
    assert core.round(training_session_id, 2).state == "cancelled"
    assert [item.parent_digest for item in versions[1:]] == [item.digest for item in versions[:-1]]


def test_a_version_is_not_published_where_its_session_was_cancelled_meanwhile(
    core: CoordinatorHarness, signer: SlowSigner
) -> None:
    training_session_id = started(core, signer)
    once(signer, lambda: core.training.cancel(SYSTEM, training_session_id, ""))

    run_round(core, training_session_id)

    assert len(core.versions(training_session_id)) == 1
    assert core.training.get(training_session_id).state == "cancelled"
