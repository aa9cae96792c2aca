"""Asynchronous rounds with secure aggregation: stale updates count by a table that the helper applies itself."""

from functools import partial
from typing import Any, Final

import grpc
import numpy as np
import pytest

from qflare.evidence.statements import digest_of
from qflare.evidence.verification import verify_bundle
from qflare.masking.staleness import usual_weights, weights_digest
from qflare.v1 import security_pb2, training_pb2, verification_pb2
from qflare_client import Client, Receipt
from qflare_client.errors import BusyError, StaleBaseVersionError
from qflare_client.models.relay import SignedUpdate
from qflare_client.tasks import Task, TaskKind
from qflare_server.context import utc_now
from qflare_server.verification import recompute_version, verify_database
from tests.independent.bundle import check_bundle
from tests.integration.secure_aggregation.conftest import (
    WEIGHTS,
    SecureDeployment,
    SecureStart,
    check_refused,
    contribute,
    trained,
    wait_for_round,
    wait_for_version,
)
from tests.integration.secure_aggregation.test_lying_coordinator import Ring
from tests.support.lying_coordinator import Lie, LyingCoordinator

FEDBUFF: Final = training_pb2.StrategyConfig(name="fedbuff")
FRESH, STALE = usual_weights(1)
LARGE: Final = {"w": np.linspace(-1, 1, 400_000, dtype=np.float32)}
"""Masked, it has two chunks of 1 MiB, and slots in the second one."""


def start(
    made: SecureDeployment, *, max_staleness: int = 1, round_count: int = 2, **settings: Any
) -> str:
    """Start an asynchronous training session of two updates a round."""
    rounds = training_pb2.RoundPolicy(quorum=2, max_staleness=max_staleness)
    return made.session(round_count=round_count, strategy=FEDBUFF, rounds=rounds, **settings)


class Straggler:
    """A device that has a task, and trains for longer than a round."""

    def __init__(self, client: Client, session_id: str, index: int) -> None:
        self._client, self._index = client, index
        self._task: Task = client.get_task(session_id)
        self._base = client.download_base(self._task)

    def finish(self) -> dict[str, np.ndarray]:
        """Send the update; return the change."""
        arrays = trained(self._base.arrays, self._index)
        self._client.submit(self._task, self._base, arrays, 7, {"loss": 1.0})
        return {name: arrays[name].astype(float) - self._base.arrays[name] for name in arrays}

    def signed(self) -> SignedUpdate:
        """Return the update, which another device may send."""
        return self._client.sign_update(self._task, self._base, self._base.arrays, 7, {"loss": 0.0})


def bundle_of(made: SecureDeployment, session_id: str) -> verification_pb2.VerificationBundle:
    bundle = verification_pb2.VerificationBundle()
    parts = made.deployment.coordinator.parts
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    return bundle


@pytest.mark.parametrize("helper_count", [1, 2], ids=["small", "large, sealed, two helpers"])
def test_a_stale_change_counts_by_its_weight(secure: SecureStart, helper_count: int) -> None:
    made, is_large = secure(helper_count=helper_count), helper_count > 1
    session_id = start(
        made,
        arrays=LARGE if is_large else WEIGHTS,
        policy={"clip": 1000.0},
        transfer=training_pb2.TransferPolicy(
            sealed=is_large, payload_retention=training_pb2.PAYLOAD_RETENTION_ALL
        ),
    )
    clients = [made.deployment.device(f"device-{index}") for index in range(3)]
    late = Straggler(clients[2], session_id, 2)
    for index in range(2):
        contribute(clients[index], session_id, index)
    first = wait_for_version(clients[0], session_id, 1)
    wait_for_round(clients[0], session_id, 2)

    stale = late.finish()
    assert clients[2].get_task(session_id).kind is TaskKind.WAIT, "one update a sum"
    fresh, _ = contribute(clients[0], session_id, 0)
    got = wait_for_version(clients[0], session_id, 2)

    for name in fresh.keys() - {"steps"}:
        mean = (fresh[name] + stale[name] * STALE / FRESH) / 2
        change = got.arrays[name].astype(float) - first.arrays[name]
        assert np.abs(change - mean).max() < 1e-4
    assert got.statement.example_count == 2
    assert abs(got.statement.metrics["train_loss"] - 0.5) < 1e-5
    context = made.deployment.coordinator.parts.context
    for version in (1, 2):
        found = recompute_version(context, session_id, version)
        assert (found.recomputed, found.differences) == (True, ())
    parts = made.deployment.coordinator.parts
    assert verify_database(context, parts.keys.root_key_ids).findings == ()
    for helper in made.helpers:
        assert "2 answers with 4 updates" in helper.run("audit", "verify")
    check_transcript(bundle_of(made, session_id), parts.keys.trust.root_key_ids())


def check_transcript(bundle: verification_pb2.VerificationBundle, pinned: Any) -> None:
    """Verify a bundle twice, and find each thing that is changed about the weights."""
    verify_bundle(bundle, pinned, utc_now())
    check_bundle(bundle, pinned, 1, utc_now())
    assert len(bundle.unmasking.earlier_tasks) == 1

    refused = partial(check_refused, bundle, pinned)
    refused(lambda other: other.unmasking.ClearField("earlier_tasks"))
    refused(lambda other: other.unmasking.earlier_tasks[0].CopyFrom(other.unmasking.task))
    refused(lambda other: other.unmasking.earlier_tasks[0].ClearField("signatures"))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_too_stale_or_a_second_update_is_not_in_the_sum(secure: SecureStart) -> None:
    made = secure()
    session_id = start(made, max_staleness=1, round_count=3)
    clients = [made.deployment.device(f"device-{index}") for index in range(4)]
    too_late = Straggler(clients[3], session_id, 3)
    late = Straggler(clients[2], session_id, 2)
    for index in range(2):
        contribute(clients[index], session_id, index)
    wait_for_version(clients[0], session_id, 1)
    wait_for_round(clients[2], session_id, 2)
    second = Straggler(clients[2], session_id, 2).signed()
    late.finish()
    (held,) = clients[0].submit_all([second])
    assert isinstance(held, BusyError)
    assert held.retry_after_s
    contribute(clients[0], session_id, 0)
    wait_for_version(clients[0], session_id, 2)
    wait_for_round(clients[0], session_id, 3)
    with pytest.raises(StaleBaseVersionError):
        too_late.finish()
    (taken,) = clients[0].submit_all([second])
    assert isinstance(taken, Receipt)
    contribute(clients[1], session_id, 1)
    assert wait_for_version(clients[0], session_id, 3).statement.contributor_count == 2


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_tables_that_are_of_no_use_are_refused(secure: SecureStart) -> None:
    made = secure()

    def refusal(**settings: Any) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            start(made, **settings)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(error.details())

    for weights in ([64], [45, 64], [64, 3], [257, 64], [1, 1, 1]):
        assert "staleness_weights" in refusal(policy={"staleness_weights": weights})
    assert "max_staleness" in refusal(max_staleness=256)
    with pytest.raises(grpc.RpcError, match="staleness_weights"):
        made.session(policy={"staleness_weights": [64, 45]})
    mode = training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS
    assert "within the round" in refusal(policy={"mode": mode, "helpers": []})
    privacy = {"noise_multiplier": 4.0, "clip_norm": 1.0, "epsilon_budget": 10.0, "delta": 1e-5}
    policy = {"clip": 0.0, "metrics": []}
    assert "buffer several times" in refusal(privacy=privacy, policy=policy)
    assert start(made, policy={"staleness_weights": [4, 2]})


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_helper_takes_no_weights_from_a_lying_coordinator(secure: SecureStart) -> None:
    made = secure()
    session_id = start(made, policy={"min_cohort": 2})
    coordinator = made.deployment.coordinator
    liar = LyingCoordinator(coordinator.address, coordinator.parts.keys.sign)
    try:
        ring = Ring(made, liar, session_id)
        members = [ring.signed(number) for number in range(2)]
    finally:
        liar.close()
    digests = [digest_of(member.statement.payload) for member in members]

    def asked(change: Lie = lambda _: None, weight: int = STALE) -> dict[str, Any]:
        """Return the request for a round after the members' task, whose weights are lies."""

        def later(task: security_pb2.TaskStatement) -> None:
            task.round_number, task.base_version, task.base_digest = 2, 1, "f" * 64
            change(task)

        task = ring.lying_task(later)
        number = security_pb2.TaskStatement.FromString(task.payload).round_number
        stated = weights_digest((digest, weight) for digest in digests)
        facts = {"task_digest": digest_of(task.payload), "round_number": number}
        return {"task": task, "weights_digest": stated, "earlier": [ring.task]} | facts

    def other_table(task: security_pb2.TaskStatement) -> None:
        task.masking.policy.staleness_weights[1] = 4

    def tuned_table(task: security_pb2.TaskStatement) -> None:
        task.masking.policy.staleness_weights[:] = [64, 1]

    ask = ring.asking
    assert "other weights" in ask.refusal(members, **asked(weight=FRESH))
    assert "other weights" in ask.refusal(members, **asked() | {"weights_digest": ""})
    assert "another task" in ask.refusal(members, **asked() | {"earlier": []})
    assert "masking" in ask.refusal(members, **asked(other_table))
    assert "staleness_weights" in ask.refusal(members, **asked(tuned_table))
    behind = asked(lambda task: setattr(task, "base_version", 5))
    assert "5 versions behind" in ask.refusal(members, **behind)
    before = asked(lambda task: setattr(task, "round_number", 1))
    assert "later round" in ask.refusal(members, **before)
    foreign = ring.lying_task(lambda task: setattr(task, "training_session_id", "another"))
    assert "earlier task" in ask.refusal(members, **asked() | {"earlier": [foreign]})
    many = asked() | {"earlier": [ring.task] * 1025}
    assert "more than 1024" in ask.refusal(members, **many)

    first, again = ask.ask(members, **asked()), ask.ask(members, **asked())
    assert first[0].answer.answer == again[0].answer.answer
    assert [part.chunk for part in first[1:]] == [part.chunk for part in again[1:]]
    assert "answered before" in ask.refusal(
        members, **asked(lambda task: setattr(task, "base_version", 0), FRESH)
    )
