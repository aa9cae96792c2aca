"""What lies in the database is folded only if it is what a device signed, and what is left out stays accounted for."""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey
from qflare.v1 import security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.aggregation.outcome import read_outcome
from qflare_server.storage import records
from qflare_server.storage.repository import updates
from qflare_server.storage.tables import (
    EVIDENCE_REASON,
    AuditLog,
    Device,
    DeviceKey,
    DeviceState,
    ModelUpdate,
    Payload,
    Round,
    RoundState,
    UpdateState,
)
from qflare_server.verification import recompute_version
from tests.conftest import FakeClock
from tests.contract.conftest import MakeCore
from tests.support.use_cases import (
    CoordinatorHarness,
    CrashError,
    CrashingDatabase,
    Draft,
    Fuse,
    floats,
    vector,
)

QUORUM_3 = training_pb2.RoundPolicy(quorum=3)
KEEP = training_pb2.TransferPolicy(payload_retention=training_pb2.PAYLOAD_RETENTION_ALL)


@dataclass
class Signed:
    """A coordinator that wants signatures, and devices with keys in its history."""

    core: CoordinatorHarness
    keys: dict[str, SigningKey]

    def draft(self, name: str, training_session_id: str, value: float, **facts: Any) -> Draft:
        key = self.keys[name]
        draft = self.core.draft(name, training_session_id, vector(value), **facts)
        draft.device = replace(
            draft.device,
            key_id=key.public.key_id,
            algorithm=int(key.public.algorithm),
            public_key=key.public.data,
        )
        draft.statement.key_id = key.public.key_id
        draft.signing_key = key
        return draft

    def submit_all(self, training_session_id: str) -> list[str]:
        """Send one update of every device, of values 1, 2 and 3; return their ids."""
        return [
            self.core.send(self.draft(name, training_session_id, number, loss=0.5)).update_id
            for number, name in enumerate(self.keys, 1)
        ]

    def edit(self, model: Any, condition: Any, **values: Any) -> None:
        """Change rows behind the coordinator's back."""
        self.core.database.write(
            lambda session: session.execute(update(model).where(condition).values(**values))
        )

    def round_of(self, update_id: str, **values: Any) -> None:
        self.edit(ModelUpdate, ModelUpdate.id == update_id, **values)

    def row(self, update_id: str) -> records.ModelUpdate:
        with self.core.database.read() as session:
            row = updates.get_update(session, update_id)
            assert row is not None
            return row


@pytest.fixture
def signed(make_core: MakeCore) -> Signed:
    return enrolled(make_core(require_signatures=True))


def enrolled(core: CoordinatorHarness) -> Signed:
    """Add three devices, each with a key of another algorithm."""
    algorithms = (Algorithm.ML_DSA_65, Algorithm.ML_DSA_44, Algorithm.ML_DSA_65_ED25519)
    keys = {
        f"device-{number}": SigningKey.generate(algorithm)
        for number, algorithm in enumerate(algorithms)
    }
    for name, key in keys.items():
        core.add_signing_device(name, key)
    return Signed(core, keys)


def events(core: CoordinatorHarness, kind: str) -> list[AuditLog]:
    with core.database.read() as session:
        return session.query(AuditLog).filter_by(event_type=kind).order_by(AuditLog.id).all()


def mean(core: CoordinatorHarness, training_session_id: str) -> float:
    return floats(core.weights(training_session_id))[0]


def test_rows_that_are_what_was_signed_are_folded(signed: Signed) -> None:
    training_session_id = signed.core.start(rounds=QUORUM_3, total_rounds=1)
    signed.submit_all(training_session_id)

    signed.core.settle()

    assert mean(signed.core, training_session_id) == 2.0
    assert not events(signed.core, "update.evidence_refused")


def resigned(
    signed: Signed, update_id: str, context: SigningContext = SigningContext.UPDATE
) -> bytes:
    """Return the signature of a row's statement by another key, made to look like the device's."""
    row = signed.row(update_id)
    assert row.statement is not None
    assert row.signature is not None
    signature = security_pb2.Signature.FromString(row.signature)
    stranger = SigningKey.generate(Algorithm(int(signature.algorithm)))
    signature.signature = stranger.sign(context, row.statement)
    return signature.SerializeToString()


def flipped(data: bytes | None) -> bytes:
    assert data is not None
    return data[:-1] + bytes([data[-1] ^ 1])


EDITS: dict[str, Callable[[Signed, str], object]] = {
    "example count": lambda signed, name: signed.round_of(name, example_count=10**6),
    "metrics": lambda signed, name: signed.round_of(name, metrics={"loss": 0.0}),
    "device": lambda signed, name: signed.round_of(name, device_id=other_device(signed)),
    "statement digest": lambda signed, name: signed.round_of(name, statement_digest="0" * 64),
    "statement": lambda signed, name: signed.round_of(
        name, statement=flipped(signed.row(name).statement)
    ),
    "no statement": lambda signed, name: signed.round_of(name, statement=None),
    "bytes that are no statement": lambda signed, name: signed.round_of(name, statement=b"\xff"),
    "signature": lambda signed, name: signed.round_of(
        name, signature=flipped(signed.row(name).signature)
    ),
    "no signature": lambda signed, name: signed.round_of(name, signature=None),
    "nothing signed": lambda signed, name: signed.round_of(
        name, signature=None, key_id=None, statement=None
    ),
    "signature of another key": lambda signed, name: signed.round_of(
        name, signature=resigned(signed, name)
    ),
    "key of another device": lambda signed, name: signed.round_of(
        name, key_id=signed.keys["device-0"].public.key_id
    ),
    "payload": lambda signed, name: signed.edit(
        Payload,
        Payload.id == signed.row(name).payload_id,
        data=np.full(3, 100, np.float32).tobytes(),
    ),
    "payload with its digest": lambda signed, name: signed.edit(
        Payload, Payload.id == signed.row(name).payload_id, digest="0" * 64
    ),
    "another payload": lambda signed, name: signed.round_of(
        name, payload_id=first_row(signed).payload_id
    ),
    "key": lambda signed, name: signed.edit(
        DeviceKey,
        DeviceKey.key_id == signed.row(name).key_id,
        public_key=SigningKey.generate(Algorithm.ML_DSA_44).public.data,
    ),
    "algorithm of the key": lambda signed, name: signed.edit(
        DeviceKey, DeviceKey.key_id == signed.row(name).key_id, algorithm=9
    ),
    "owner of the key": lambda signed, name: signed.edit(
        DeviceKey, DeviceKey.key_id == signed.row(name).key_id, device_id="device-0", sequence=2
    ),
    "key that was retired long before": lambda signed, name: signed.edit(
        DeviceKey,
        DeviceKey.key_id == signed.row(name).key_id,
        retired_at=signed.core.clock() - timedelta(hours=1),
    ),
}


def other_device(signed: Signed) -> str:
    signed.core.add_signing_device("device-9", SigningKey.generate())
    return "device-9"


def first_row(signed: Signed) -> ModelUpdate:
    with signed.core.database.read() as session:
        row = session.query(ModelUpdate).order_by(ModelUpdate.acceptance_sequence).first()
        assert row is not None
        return row


@pytest.mark.parametrize("edit", EDITS)
def test_a_row_that_was_edited_is_never_folded(signed: Signed, edit: str) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1, transfer=KEEP)
    ids = signed.submit_all(training_session_id)
    EDITS[edit](signed, ids[1])

    core.settle()

    row = signed.row(ids[1])
    assert (row.state, row.aggregated_version) == (UpdateState.REJECTED.value, None)
    assert row.state_reason.startswith(EVIDENCE_REASON)
    assert (
        mean(core, training_session_id) == 2.0
    )  # of 1 and 3: what was edited to anything else is not in it
    (event,) = events(core, "update.evidence_refused")
    assert (event.subject, event.details["reason"]) == (f"update:{ids[1]}", row.state_reason)
    assert core.versions(training_session_id)[1].participant_count == 2


def forge(signed: Signed, update_id: str, receipt: bytes | None) -> None:
    """Insert a key for the device of an update, and sign the whole row anew with it."""
    core, row, key = signed.core, signed.row(update_id), SigningKey.generate()
    assert row.statement is not None
    statement = security_pb2.UpdateStatement.FromString(row.statement)
    statement.key_id = key.public.key_id
    statement.example_count = 10**6
    envelope = sign_envelope(key, SigningContext.UPDATE, statement)
    inserted = DeviceKey(
        key_id=key.public.key_id,
        device_id=row.device_id,
        sequence=2,
        algorithm=int(key.public.algorithm),
        public_key=key.public.data,
        statement=receipt,
        created_at=core.clock(),
    )
    core.database.write(lambda session: session.add(inserted))
    signed.round_of(
        update_id,
        key_id=key.public.key_id,
        example_count=statement.example_count,
        statement=envelope.payload,
        statement_digest=hashlib.sha256(envelope.payload).hexdigest(),
        signature=envelope.signatures[0].SerializeToString(),
    )


def receipt_of(signed: Signed, name: str) -> bytes:
    with signed.core.database.read() as session:
        row = session.get(DeviceKey, signed.keys[name].public.key_id)
        assert row is not None
        assert row.statement is not None
        return row.statement


RECEIPTS: dict[str, Callable[[Signed], bytes | None]] = {
    "none": lambda _signed: None,
    "of the device's own key": lambda signed: receipt_of(signed, "device-1"),
    "of another device": lambda signed: receipt_of(signed, "device-0"),
    "that is none": lambda _signed: b"\xff",
}


@pytest.mark.parametrize("receipt", RECEIPTS)
def test_an_update_signed_by_an_inserted_key_is_never_folded(signed: Signed, receipt: str) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    forge(signed, ids[1], RECEIPTS[receipt](signed))

    core.settle()

    row = signed.row(ids[1])
    assert (row.state, row.aggregated_version) == (UpdateState.REJECTED.value, None)
    assert row.state_reason.startswith(EVIDENCE_REASON)
    assert mean(core, training_session_id) == 2.0
    assert len(events(core, "update.evidence_refused")) == 1


def test_another_process_demands_the_receipts_anew(signed: Signed, make_core: MakeCore) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    signed.edit(DeviceKey, DeviceKey.key_id == signed.row(ids[1]).key_id, statement=None)
    worker = make_core(require_signatures=True)

    worker.settle()

    assert signed.row(ids[1]).state == UpdateState.REJECTED.value
    assert signed.row(ids[0]).state == UpdateState.AGGREGATED.value
    assert mean(core, training_session_id) == 2.0


def test_an_inserted_row_without_a_signature_is_never_folded(signed: Signed) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    core.add_signing_device("device-4", SigningKey.generate())
    columns = {
        column.key: getattr(signed.row(ids[0]), column.key) for column in ModelUpdate.__table__.c
    }
    nothing = {"statement": None, "signature": None, "key_id": None}
    update_id = str(uuid.uuid4())
    place = {"id": update_id, "device_id": "device-4", "acceptance_sequence": 4}
    inserted = ModelUpdate(**(columns | nothing | place))
    core.database.write(lambda session: session.add(inserted))
    place_of = Round.training_session_id == training_session_id
    signed.edit(Round, place_of, accepted_count=4)

    core.settle()

    assert signed.row(update_id).state == UpdateState.REJECTED.value
    assert core.versions(training_session_id)[1].participant_count == 3


@pytest.mark.parametrize("required", [True, False])
def test_a_row_that_says_it_is_in_process_is_not_mixed_in(
    make_core: MakeCore, *, required: bool
) -> None:
    signed = enrolled(make_core(require_signatures=required))
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    nothing = {"statement": None, "signature": None, "key_id": None}
    signed.round_of(ids[1], origin="in_process", **nothing)

    core.settle()

    row = signed.row(ids[1])
    assert row.state == UpdateState.REJECTED.value
    assert "origin" in row.state_reason
    assert core.versions(training_session_id)[1].in_process_count == 0


def test_an_edited_update_for_another_round_is_not_folded_there(signed: Signed) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=2)
    signed.submit_all(training_session_id)
    core.settle()
    ids = signed.submit_all(training_session_id)
    earlier = core.updates(training_session_id, 1)[0]
    assert earlier.statement is not None
    columns = ("statement", "signature", "statement_digest", "payload_id", "payload_digest")
    values = {name: getattr(earlier, name) for name in columns}
    signed.edit(ModelUpdate, ModelUpdate.id == earlier.id, statement_digest="1" * 64)
    signed.round_of(ids[0], **values)

    core.settle()

    assert signed.row(ids[0]).state == UpdateState.REJECTED.value


def test_a_key_that_was_retired_while_the_round_was_open_still_counts(
    signed: Signed, clock: FakeClock
) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    key_id = signed.row(ids[0]).key_id
    signed.edit(DeviceKey, DeviceKey.key_id == key_id, retired_at=clock())

    core.settle()

    assert signed.row(ids[0]).state == UpdateState.AGGREGATED.value


def test_a_round_in_which_nothing_is_left_fails_with_a_reason_and_another_opens(
    signed: Signed,
) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    signed.edit(
        ModelUpdate, ModelUpdate.training_session_id == training_session_id, example_count=7
    )

    core.settle()

    failed = core.round(training_session_id, 1)
    assert failed.state == RoundState.FAILED.value
    assert "got 0" in failed.state_reason
    assert all(signed.row(name).state_reason.startswith(EVIDENCE_REASON) for name in ids)
    assert len(events(core, "update.evidence_refused")) == 3
    assert core.round(training_session_id, 2).state == RoundState.OPEN.value


@pytest.mark.parametrize("strategy", ["fedavg", "median", "krum", "geometric_median"])
def test_a_version_without_an_edited_update_is_made_again(
    make_core: MakeCore, strategy: str
) -> None:
    signed = enrolled(make_core(require_signatures=True))
    core = signed.core
    for number in (3, 4):
        key = SigningKey.generate()
        signed.keys[f"device-{number}"] = key
        core.add_signing_device(f"device-{number}", key)
    training_session_id = core.start(
        rounds=training_pb2.RoundPolicy(quorum=5),
        total_rounds=1,
        transfer=KEEP,
        strategy=training_pb2.StrategyConfig(name=strategy),
    )
    ids = signed.submit_all(training_session_id)
    signed.round_of(ids[1], example_count=10**6)
    core.settle()

    again = recompute_version(core.context, training_session_id, 1)

    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)
    outcome = read_outcome(core.context, core.versions(training_session_id)[1])
    assert outcome is not None
    assert [entry.update_id for entry in outcome.judgements] == ids
    assert list(outcome.rejected) == [ids[1]]


def test_a_version_is_made_again_by_its_record_where_the_row_was_put_back(signed: Signed) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1, transfer=KEEP)
    ids = signed.submit_all(training_session_id)
    signed.round_of(ids[2], example_count=10**6)
    core.settle()
    signed.round_of(ids[2], example_count=10)

    again = recompute_version(core.context, training_session_id, 1)

    assert (again.differences, again.by_record) == ((), True)


def test_a_row_that_is_edited_after_its_version_shows_when_it_is_made_again(
    signed: Signed,
) -> None:
    core = signed.core
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1, transfer=KEEP)
    ids = signed.submit_all(training_session_id)
    core.settle()
    signed.round_of(ids[2], signature=flipped(signed.row(ids[2]).signature))

    assert recompute_version(core.context, training_session_id, 1).differences


def test_a_version_of_updates_that_nobody_had_to_sign_is_made_again_by_its_record(
    make_core: MakeCore,
) -> None:
    core = make_core()
    core.add_devices(3)
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1, transfer=KEEP)
    for number in range(3):
        core.submit(f"device-{number}", training_session_id, vector(float(number)))
    core.settle()
    strict = make_core(require_signatures=True)

    again = recompute_version(strict.context, training_session_id, 1)

    assert (again.differences, again.by_record) == ((), True)


def test_where_signatures_are_off_nothing_is_checked(make_core: MakeCore) -> None:
    core = make_core()
    core.add_devices(3)
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1)
    for number in range(3):
        core.submit(f"device-{number}", training_session_id, vector(1.0))

    core.settle()

    assert core.versions(training_session_id)[1].participant_count == 3


def test_an_edited_update_is_not_held_against_its_device(signed: Signed) -> None:
    core = signed.core
    safeguards = training_pb2.SafeguardPolicy(quarantine_rejections=1)
    training_session_id = core.start(rounds=QUORUM_3, total_rounds=1, safeguards=safeguards)
    ids = signed.submit_all(training_session_id)
    signed.round_of(ids[0], example_count=10**6)

    core.settle()

    with core.database.read() as session:
        states = {row.state for row in session.query(Device)}
    assert states == {DeviceState.ACTIVE.value}


def test_another_process_verifies_for_itself(signed: Signed, make_core: MakeCore) -> None:
    training_session_id = signed.core.start(rounds=QUORUM_3, total_rounds=1)
    ids = signed.submit_all(training_session_id)
    signed.round_of(ids[0], signature=resigned(signed, ids[0]))
    other = make_core(require_signatures=True)

    other.settle()

    assert signed.row(ids[0]).state == UpdateState.REJECTED.value
    assert mean(other, training_session_id) == 2.5


def test_an_update_of_an_earlier_round_s_task_counts_in_a_buffer(signed: Signed) -> None:
    core = signed.core
    training_session_id = core.start(
        strategy=training_pb2.StrategyConfig(name="fedbuff"),
        rounds=training_pb2.RoundPolicy(quorum=1, max_staleness=5),
        transfer=training_pb2.TransferPolicy(update_kind=training_pb2.UPDATE_KIND_DELTA),
        total_rounds=2,
    )
    late = signed.draft("device-1", training_session_id, 1.0)
    late.statement.kind = training_pb2.UPDATE_KIND_DELTA
    early = signed.draft("device-0", training_session_id, 1.0)
    early.statement.kind = training_pb2.UPDATE_KIND_DELTA
    core.send(early)
    core.settle()

    accepted = core.send(late)
    core.settle()

    assert accepted.round_number == 2
    assert signed.row(accepted.update_id).state == UpdateState.AGGREGATED.value


def test_crash_between_any_two_steps_leaves_out_the_same_update(make_core: MakeCore) -> None:
    signed = enrolled(make_core(require_signatures=True))
    wanted = None
    for step in range(1, 60):
        training_session_id = signed.core.start(rounds=QUORUM_3, total_rounds=1)
        ids = signed.submit_all(training_session_id)
        signed.round_of(ids[0], example_count=10**6)
        fuse = Fuse(step)
        context = replace(
            signed.core.context, database=CrashingDatabase(signed.core.database, fuse)
        )
        crashed = False
        try:
            crashing = Aggregator(context, signed.core.executor, signed.core.config.realm)
            while crashing.run_once():
                pass
        except CrashError:
            crashed = True
        survivor = Aggregator(signed.core.context, signed.core.executor, signed.core.config.realm)
        while survivor.run_once():
            pass
        found = (
            signed.core.weights(training_session_id, 1),
            [signed.row(name).state for name in ids],
        )
        wanted = wanted or found
        assert found == wanted
        assert len(events(signed.core, "update.evidence_refused")) == step
        if not crashed:
            return
    raise AssertionError("the pass has no end")
