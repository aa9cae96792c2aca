"""Central differential privacy of training sessions, on both databases."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete
from sqlalchemy.orm import Session

from qflare.crypto.symmetric import SECRET_BYTES
from qflare.v1 import security_pb2, training_pb2
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.aggregation.fold import RoundFold
from qflare_server.aggregation.plan import read_plan
from qflare_server.aggregation.publication import Publication, prepare_publication
from qflare_server.errors import StrategyRefusedError
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import audit, training_sessions, updates
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.tables import GlobalModel, ModelUpdate
from qflare_server.strategies.accounting import PrivacyLedger, spent
from qflare_server.training.privacy import PrivacyCharge, allowance, noise_seed, open_seed
from qflare_server.training.release_journal import FILE, ReleaseJournal
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness, floats, vector

DELTA = 1e-5
NOISE = 4.0
REPLACED = "privacy.noise_seed_replaced"


def epsilon_of(count: int) -> float:
    """Return the guarantee after so many versions."""
    ledger = PrivacyLedger()
    for _ in range(count):
        ledger = ledger.with_release(NOISE, 1.0)
    return spent(ledger, DELTA).epsilon


def policy(**changes: Any) -> training_pb2.PrivacyPolicy:
    """Return a policy whose budget lasts for two versions and a little."""
    values = {
        "noise_multiplier": NOISE,
        "clip_norm": 1.0,
        "delta": DELTA,
        "epsilon_budget": epsilon_of(2) * 1.01,
    }
    return training_pb2.PrivacyPolicy(**{**values, **changes})


def start(core: CoordinatorHarness, **config: Any) -> str:
    quorum = training_pb2.RoundPolicy(quorum=2)
    wanted: dict[str, Any] = {"privacy": policy(), "rounds": quorum, **config}
    return core.start(vector(0.0, 300), **wanted)


def run_round(core: CoordinatorHarness, training_session_id: str) -> None:
    for device in ("device-0", "device-1"):
        core.submit(device, training_session_id, vector(1.0, 300), loss=0.5)
    core.settle()


def owner_of(core: CoordinatorHarness, training_session_id: str) -> TrainingSession:
    return core.training.get(training_session_id)


def test_a_version_states_its_guarantee(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)

    version = core.versions(training_session_id)[1]

    statement = security_pb2.ModelStatement.FromString(version.statement)
    assert version.epsilon == statement.epsilon == pytest.approx(epsilon_of(1))
    assert version.delta == statement.delta == DELTA
    assert owner_of(core, training_session_id).epsilon_spent == version.epsilon


def test_loss_distributions_are_an_option_that_lasts_longer(core: CoordinatorHarness) -> None:
    """The budget affords two versions, of which the accountant by orders would refuse the second."""
    ledger = PrivacyLedger().with_release(NOISE, 1.0)
    tight = spent(ledger.with_release(NOISE, 1.0), DELTA, "pld").epsilon
    assert tight < epsilon_of(2)
    training_session_id = start(
        core,
        privacy=policy(
            accountant=training_pb2.PRIVACY_ACCOUNTANT_PLD, epsilon_budget=tight * 1.0001
        ),
    )

    run_round(core, training_session_id)
    run_round(core, training_session_id)

    versions = core.versions(training_session_id)
    assert [row.epsilon for row in versions[1:]] == [
        pytest.approx(spent(ledger, DELTA, "pld").epsilon),
        pytest.approx(tight),
    ]
    assert owner_of(core, training_session_id).state == "completed"


def test_the_guarantee_composes_over_versions(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)
    run_round(core, training_session_id)

    assert owner_of(core, training_session_id).epsilon_spent == pytest.approx(epsilon_of(2))


def test_updates_are_clipped_and_noise_of_the_stated_size_is_added(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)

    noisy = np.array(floats(core.weights(training_session_id, 1)))

    # The clipped mean has elements of 1 / sqrt(300); the noise has a deviation of 4 * 1 / 2.
    assert noisy.std() == pytest.approx(2.0, rel=0.2)


def test_the_denominator_is_the_number_of_updates_at_which_a_round_closes(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core, rounds=training_pb2.RoundPolicy(quorum=1, target=4))
    for device in ("device-0", "device-1", "device-2", "device-3"):
        core.submit(device, training_session_id, vector(1.0, 300))
    core.settle()

    noisy = np.array(floats(core.weights(training_session_id, 1)))

    assert noisy.std() == pytest.approx(1.0, rel=0.2)  # 4 * 1 / 4


def test_metrics_that_no_noise_covers_are_left_out(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)

    assert core.versions(training_session_id)[1].metrics == {}


def test_training_ends_when_no_further_version_can_be_afforded(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)
    run_round(core, training_session_id)

    owner = owner_of(core, training_session_id)

    assert (owner.state, owner.current_version) == ("completed", 2)
    assert owner.state_reason.startswith("privacy budget spent")


def test_a_version_past_the_budget_is_not_released(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    for device in ("device-0", "device-1"):
        core.submit(device, training_session_id, vector(1.0, 300))
    core.database.write(
        lambda session: training_sessions.update_session(
            session, training_session_id, {"privacy_state": {"ledger": [[NOISE, 1.0, 2]]}}
        )
    )
    core.settle()

    owner = owner_of(core, training_session_id)

    assert (owner.state, owner.current_version) == ("completed", 0)
    assert owner.state_reason.startswith("privacy budget exceeded")
    assert [item.state for item in core.updates(training_session_id, 1)] == ["rejected", "rejected"]
    assert core.count(GlobalModel) == 1


def fold_round(core: CoordinatorHarness, training_session_id: str) -> RoundFold:
    """Fold round 1."""
    with core.database.read() as session:
        plan = read_plan(session, training_session_id, 1, 0)
        accepted = updates.accepted_after(session, training_session_id, 1, 0, 10)
    seed = noise_seed(core.context, plan.config, training_session_id, plan.privacy_state)
    fold = RoundFold(core.context, plan, noise_seed=seed)
    fold.take(accepted)
    return fold


def test_a_process_that_takes_over_releases_the_same_noise(make_core: MakeCore) -> None:
    first, second = make_core(), make_core()
    first.add_devices(2)
    training_session_id = start(first)
    for device in ("device-0", "device-1"):
        first.submit(device, training_session_id, vector(1.0, 300))
    lost = fold_round(first, training_session_id).write(first.executor, first.clock()).payload

    second.settle()

    assert second.versions(training_session_id)[1].payload_digest == lost.digest


def test_a_version_is_not_published_on_a_ledger_that_has_moved_on(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    for device in ("device-0", "device-1"):
        core.submit(device, training_session_id, vector(1.0, 300))
    ledger = PrivacyLedger().with_release(NOISE, 1.0)
    allowed = allowance(owner_of(core, training_session_id).config, None)
    publication = prepare(core, training_session_id, allowed)
    core.database.write(
        lambda session: training_sessions.update_session(
            session, training_session_id, {"privacy_state": {"ledger": ledger.as_rows()}}
        )
    )

    assert not core.database.write(publication.run)
    assert core.count(GlobalModel) == 1


def prepare(
    core: CoordinatorHarness, training_session_id: str, allowed: PrivacyCharge
) -> Publication:
    """Write the bytes of the version of round 1, up to its publication."""
    fold = fold_round(core, training_session_id)
    closed_at = core.round(training_session_id, 1).closed_at
    assert closed_at is not None
    return prepare_publication(core.context, core.executor, fold, closed_at, allowed)


def test_the_seed_does_not_open_under_another_state_key(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)
    state = owner_of(core, training_session_id).privacy_state
    thief = replace(core.context, state_key=bytes(32))

    assert len(open_seed(core.context, training_session_id, state) or b"") == SECRET_BYTES
    assert open_seed(thief, training_session_id, state) is None


def test_training_goes_on_after_the_state_key_was_replaced(make_core: MakeCore) -> None:
    core, restarted = make_core(), make_core()
    core.add_devices(2)
    training_session_id = start(core)
    run_round(core, training_session_id)
    restarted.aggregator = Aggregator(
        replace(restarted.context, state_key=bytes(32)), restarted.executor, "restarted"
    )

    core.aggregator.close()
    run_round(restarted, training_session_id)

    assert owner_of(core, training_session_id).current_version == 2
    with core.database.read() as session:
        drawn = audit.list_entries(session, PageRequest(10), AuditFilter(event_type=REPLACED))
        assert len(drawn.rows) == 1


def prepare_with(
    core: CoordinatorHarness, training_session_id: str, value: float
) -> np.ndarray[Any, Any]:
    """Submit two updates, of which the second is of this value, and return what version 1 would be."""
    core.submit("device-0", training_session_id, vector(0.0, 300))
    core.submit("device-1", training_session_id, vector(value, 300))
    fold = fold_round(core, training_session_id)
    written = fold.write(core.executor, core.clock()).payload
    assert written.data is not None
    return np.frombuffer(written.data, "<f4")


def test_a_version_made_again_of_other_updates_has_other_noise(make_core: MakeCore) -> None:
    """After a restored backup: with the same noise, the difference of both versions would be one device's change."""
    core = make_core()
    core.add_devices(2)
    training_session_id = start(core)
    first = prepare_with(core, training_session_id, 1.0)
    forget_updates(core, training_session_id)

    again = prepare_with(core, training_session_id, -1.0)

    difference = first - again
    assert difference.std() == pytest.approx(2.0 * np.sqrt(2.0), rel=0.25)  # two independent noises
    assert abs(np.corrcoef(first, again)[0, 1]) < 0.25


def forget_updates(core: CoordinatorHarness, training_session_id: str) -> None:
    """Take round 1 back to before any update, as a backup does."""

    def work(session: Session) -> None:
        session.execute(
            delete(ModelUpdate).where(ModelUpdate.training_session_id == training_session_id)
        )
        values = {"accepted_count": 0, "example_count": 0, "state": "open", "closed_at": None}
        training_sessions.update_round(session, training_session_id, 1, values)

    core.database.write(work)


def test_integers_of_a_private_session_are_those_of_its_base(core: CoordinatorHarness) -> None:
    quorum = training_pb2.RoundPolicy(quorum=2)
    base = {"steps": np.array([5, 6], np.int64), **vector(0.0, 4)}
    training_session_id = core.start(base, privacy=policy(), rounds=quorum)
    for device in ("device-0", "device-1"):
        core.submit(
            device, training_session_id, {"steps": np.array([7, 8], np.int64), **vector(1.0, 4)}
        )
    core.settle()

    version = core.weights(training_session_id, 1)

    assert np.frombuffer(version[:16], "<i8").tolist() == [5, 6]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"privacy": policy(epsilon_budget=0.01)}, "past the budget"),
        ({"privacy": policy(clip_norm=0.0)}, "clip_norm must be above 0"),
        ({"privacy": policy(delta=0.0)}, "delta must be within"),
        ({"privacy": policy(noise_multiplier=0.0)}, "privacy without noise is none"),
        ({"strategy": training_pb2.StrategyConfig(name="median")}, "sensitivity is not bounded"),
        (
            {
                "strategy": training_pb2.StrategyConfig(name="fedbuff"),
                "rounds": training_pb2.RoundPolicy(max_staleness=2),
            },
            "in a buffer several times",
        ),
        ({"safeguards": training_pb2.SafeguardPolicy(clip_norm=1.0)}, "brings its own clipping"),
    ],
)
def test_contradictions_are_refused_when_the_session_is_created(
    core: CoordinatorHarness, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(StrategyRefusedError, match=message):
        start(core, **config)


def restart(core: CoordinatorHarness) -> None:
    """Give the coordinator a new aggregator, as a restart does."""
    core.aggregator.close()
    core.aggregator = Aggregator(core.context, core.executor, "one")


def journal_of(core: CoordinatorHarness) -> ReleaseJournal:
    return ReleaseJournal(core.config.data_dir / FILE)


def restored(core: CoordinatorHarness) -> int:
    with core.database.read() as session:
        events = AuditFilter(event_type="privacy.restore_detected")
        return len(audit.list_entries(session, PageRequest(10), events).rows)


def test_released_versions_are_journaled_outside_of_the_database(core: CoordinatorHarness) -> None:
    training_session_id = start(core)
    run_round(core, training_session_id)

    version = core.versions(training_session_id)[1]

    assert journal_of(core).read(training_session_id) == {version.digest: 1}
    assert journal_of(core).read("another") == {}


def test_a_damaged_line_hides_no_other(core: CoordinatorHarness) -> None:
    journal_of(core).append("session", {"ab" * 32: 1})
    with (core.config.data_dir / FILE).open("a") as file:
        file.write('{"training_session_id": "sess')

    journal_of(core).append("session", {"cd" * 32: 2})

    assert journal_of(core).read("session") == {"ab" * 32: 1, "cd" * 32: 2}


def test_what_a_restored_database_has_lost_stays_in_the_account(core: CoordinatorHarness) -> None:
    """The journal knows of a version 1 that was released before the database went back."""
    training_session_id = start(core)
    journal_of(core).append(training_session_id, {"ab" * 32: 1})

    run_round(core, training_session_id)

    owner = owner_of(core, training_session_id)
    assert restored(core) == 1
    assert owner.epsilon_spent == pytest.approx(epsilon_of(2))
    assert (owner.state, owner.current_version) == ("completed", 1)  # the budget lasts for two


def test_a_loss_is_counted_once(core: CoordinatorHarness) -> None:
    wide = policy(epsilon_budget=epsilon_of(9))
    training_session_id = start(core, privacy=wide)
    journal_of(core).append(training_session_id, {"ab" * 32: 1})
    run_round(core, training_session_id)
    restart(core)

    run_round(core, training_session_id)

    assert restored(core) == 1
    assert owner_of(core, training_session_id).epsilon_spent == pytest.approx(epsilon_of(3))


def test_a_restart_without_a_restore_finds_nothing(core: CoordinatorHarness) -> None:
    training_session_id = start(core, privacy=policy(epsilon_budget=epsilon_of(9)))
    run_round(core, training_session_id)
    (core.config.data_dir / FILE).unlink()  # a crash before the journal was written
    restart(core)

    run_round(core, training_session_id)

    assert restored(core) == 0
    assert len(journal_of(core).read(training_session_id)) == 2
    assert owner_of(core, training_session_id).epsilon_spent == pytest.approx(epsilon_of(2))


def test_a_journal_that_cannot_be_read_or_written_stops_no_training(
    core: CoordinatorHarness,
) -> None:
    training_session_id = start(core)
    (core.config.data_dir / FILE).mkdir()

    run_round(core, training_session_id)

    assert owner_of(core, training_session_id).current_version == 1


OTHER_REASONS = (
    "payload_digest",
    "contributors_digest",
    "parent_digest",
    "config_digest",
    "create_time",
    "training_session_id",
)
"""Fields of a version's statement that differ between any two sessions: by noise, ids and times."""


def public_facts(core: CoordinatorHarness, value: float, count: int) -> Any:
    """Return what is published of a version beside its noisy weights, if one of two updates is of this content."""
    base = {"steps": np.array([5], np.int64), **vector(0.0, 300)}
    session_id = core.start(
        base, privacy=policy(), rounds=training_pb2.RoundPolicy(quorum=2), total_rounds=3
    )
    mine = {"steps": np.array([count], np.int64), **vector(value, 300)}
    theirs = {"steps": np.array([7], np.int64), **vector(0.5, 300)}
    core.submit("device-0", session_id, mine, loss=min(value, 1e30), seen=count)
    core.submit("device-1", session_id, theirs, loss=0.5)
    core.settle()
    (_, version) = core.versions(session_id)
    statement = security_pb2.ModelStatement.FromString(version.statement)
    for name in OTHER_REASONS:
        statement.ClearField(name)  # type: ignore[arg-type]
    row = core.round(session_id, 1)
    states = [item.state for item in core.updates(session_id, 1)]
    counts = (row.accepted_count, row.rejected_count, row.example_count, version.metrics)
    return statement, counts, states, core.weights(session_id, 1)[:8]


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    value=st.sampled_from([3.4e38, -3.4e38, 1e20, 1e-45, -0.0, 0.0, 1.0, 1e3]),
    count=st.sampled_from([0, -1, 8, 2**62]),
)
def test_nothing_published_beside_the_noisy_weights_depends_on_an_update(
    core: CoordinatorHarness, value: float, count: int
) -> None:
    """What a device sends is told apart by no count, metric, integer, refusal or field of the statement.

    Participation and example counts are not secret (`docs/strategies.md`).
    """
    assert public_facts(core, value, count) == public_facts(core, 0.5, 7)
