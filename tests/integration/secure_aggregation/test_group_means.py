"""Robust rules on the means of groups, under secure aggregation with neighbors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.evidence.verification import verify_bundle
from qflare.masking.masks import Mask
from qflare.tensors import CHUNK_BYTES
from qflare.v1 import training_pb2
from qflare_client import Client
from qflare_server.aggregation import aggregator, group_means
from qflare_server.context import utc_now
from qflare_server.payloads.reader import PayloadBytes
from qflare_server.storage.repository import payloads, training_sessions, updates
from qflare_server.storage.tables import ModelUpdate
from qflare_server.verification.recomputation import recompute_version
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import WEIGHTS, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import (
    bundle_of,
    expire,
    finish,
    mean_of,
    members_of,
    session_of,
    take_step,
    train,
    until,
)

COUNT = 15
HOSTILE = 20.0  # below the clip, over all elements


def start(deployment: Deployment, name: str, parameters: dict[str, float]) -> str:
    strategy = training_pb2.StrategyConfig(name=name, parameters=parameters)
    return session_of(deployment, COUNT, 12, group_size=4, strategy=strategy)


def train_all(
    made: Deployment, clients: list[Client], session_id: str, missing: set[int] | None = None
) -> dict[int, dict[int, Any]]:
    """Run a round in which all of group 1 lie; return the changes by group and index."""
    left = [client for index, client in enumerate(clients) if index not in (missing or set())]
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    groups = {item.device_id: item.group_number for item in members_of(made, session_id)}
    changes: dict[int, dict[int, Any]] = {1: {}, 2: {}, 3: {}}
    for client in left:
        index = clients.index(client)
        group = groups[client.device_id]
        assert group is not None
        shift = HOSTILE if group == 1 else 0.0
        train(client, session_id, index, changes[group], shift)
    expire(made, session_id)
    take_step(made, session_id, left, "has_confirmed")
    finish(made, session_id, left)
    return changes


def robust(name: str, means: np.ndarray) -> np.ndarray:
    """Return what a rule makes of the means of three groups, by its definition."""
    if name in {"median", "trimmed_mean"}:
        return np.asarray(np.median(means, axis=0))
    distances = ((means[:, None] - means[None]) ** 2).sum(axis=2)
    return np.asarray(means[np.sort(distances, axis=1)[:, 1].argmin()])  # the one with the nearest


@pytest.mark.parametrize(
    ("database_url", "name", "parameters"),
    [
        ("sqlite", "median", {}),
        ("postgresql", "median", {}),
        ("sqlite", "trimmed_mean", {"trimmed_fraction": 0.34}),
        ("sqlite", "krum", {}),
    ],
    indirect=["database_url"],
)
def test_a_rule_compares_the_means_of_groups(
    deploy: Callable[..., Deployment], name: str, parameters: dict[str, float]
) -> None:
    """Group 1 lies as a whole; the version is what the rule makes of the three means."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(COUNT)]
    session_id = start(made, name, parameters)
    changes = train_all(made, clients, session_id, missing={COUNT - 1})
    model = wait_for_version(clients[0], session_id, 1)
    means = np.stack(
        [
            np.concatenate([mean_of(changes[group], tensor).ravel() for tensor in ("w", "b")])
            for group in (1, 2, 3)
        ]
    )
    assert np.abs(means[0] - means[1]).min() > HOSTILE / 2
    got = np.concatenate(
        [(model.arrays[tensor].astype(float) - WEIGHTS[tensor]).ravel() for tensor in ("w", "b")]
    )
    assert np.abs(got - robust(name, means)).max() < 1e-5
    counted = [index for group in changes.values() for index in group]
    assert model.statement.contributor_count == len(counted) == COUNT - 1
    assert model.statement.example_count == sum(100 * (index + 1) for index in counted)
    losses = sum(50.0 * (index + 1) * index for index in counted) / model.statement.example_count
    assert model.statement.metrics["train_loss"] == pytest.approx(losses, abs=1e-6)
    pinned = made.coordinator.parts.keys.trust.root_key_ids()
    verify_bundle(bundle_of(made, session_id), pinned, utc_now())
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert (found.recomputed, found.differences) == (True, ())


@pytest.mark.parametrize(
    ("name", "policy", "problem"),
    [
        ("median", {"group_size": 0}, "median looks at single updates"),
        ("krum", {"group_size": 5}, "krum needs a quorum of at least 3 groups of"),
        ("median", {"group_size": 13}, "want 3, the larger of min_cohort and 3"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_too_few_groups_are_refused_at_creation(
    deploy: Callable[..., Deployment], name: str, policy: dict[str, Any], problem: str
) -> None:
    made = deploy()
    strategy = training_pb2.StrategyConfig(name=name)
    with pytest.raises(grpc.RpcError) as caught:
        session_of(made, 12, 12, strategy=strategy, **policy)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in (caught.value.details() or "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_damaged_update_of_an_opened_group_makes_no_version(
    deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of a group without one of its updates says nothing, so the round ends and another one begins."""
    monkeypatch.setattr(aggregator, "REST_S", 0.05)
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(9)]
    arrays: dict[str, np.ndarray] = {
        "w": np.zeros(600_000, np.float32),
        "b": np.zeros(5, np.float64),
    }
    strategy = training_pb2.StrategyConfig(name="median")
    session_id = session_of(made, 9, 9, arrays=arrays, group_size=3, strategy=strategy)
    take_step(made, session_id, clients, "")
    take_step(made, session_id, clients, "has_shares")
    for index, client in enumerate(clients):
        train(client, session_id, index, {})
    alter(made, session_id, chunk=1)
    take_step(made, session_id, clients, "has_confirmed")
    finish(made, session_id, clients)
    until(clients[0], session_id, lambda task: task.round_number == 2)
    with made.coordinator.parts.database.read() as session:
        first = training_sessions.get_round(session, session_id, 1)
    assert first is not None
    assert first.state == "failed"
    assert "chunk 1 is not the one" in (first.state_reason or "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", ["median", "fedavg"])
def test_a_sum_without_a_member_is_not_recomputed(
    deploy: Callable[..., Deployment], name: str
) -> None:
    """An update whose row was altered is refused, and what is left of its group says nothing."""
    made = deploy(worker_poll_s=0.02)
    clients = [made.device(f"device-{index}") for index in range(COUNT)]
    session_id = start(made, name, {})
    train_all(made, clients, session_id)
    wait_for_version(clients[0], session_id, 1)
    made.coordinator.parts.database.write(
        lambda session: session.execute(
            sqlalchemy.update(ModelUpdate)
            .where(ModelUpdate.device_id == clients[3].device_id)
            .values(signature=b"")
        )
    )
    found = recompute_version(made.coordinator.parts.context, session_id, 1)
    assert "missing or altered" in "".join(found.differences)


def alter(made: Deployment, session_id: str, chunk: int) -> None:
    """Alter one byte of a stored chunk of the first update."""
    context = made.coordinator.parts.context
    with context.database.read() as session:
        update = updates.accepted_after(session, session_id, 1, 0, 1)[0]
        stored = payloads.get_payload(session, update.payload_id)
    assert stored is not None
    store = context.store_of(stored.store)
    (data,) = store.read(update.payload_id, chunk, 1)
    store.append(update.payload_id, chunk, [bytes([data[0] ^ 1]) + data[1:]])


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_windows_of_a_sum_are_the_sum(data: st.DataObject) -> None:
    """Any slice, in any order, is that of the sum of the updates without the masks."""
    length = CHUNK_BYTES // 4
    size = 2 * length + data.draw(st.integers(1, 50))
    updates_sum = np.zeros(size, np.uint32)
    sources: list[Callable[[], PayloadBytes]] = []
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 2**32, size, np.uint32)
        updates_sum += values
        sources.append(partial(_Source, values.tobytes()))
    masks = [(bytes([number]) * 32, 1 if number else -1) for number in range(2)]
    for seed, sign in masks:
        Mask(seed).subtract_from(updates_sum, 0) if sign > 0 else Mask(seed).add_to(updates_sum, 0)
    total = group_means.GroupSum(sources, masks, size, np.dtype("<u4"))
    for boundary in (0, length, size):
        assert len(total.read(boundary, boundary)) == 0
    near = st.integers(length - 5, length + 5) | st.integers(0, size)
    for _ in range(4):
        start, stop = sorted((min(data.draw(near), size), min(data.draw(near), size)))
        assert (total.read(start, stop) == updates_sum[start:stop]).all()


class _Source(PayloadBytes):
    """Bytes in memory in place of a stored payload."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self._content)[offset : offset + length]
