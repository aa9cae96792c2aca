"""A key store that is used twice in a round with neighbors: the copy masks, confirms and reveals nothing."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pytest

from qflare.v1 import coordinator_service_pb2 as calls
from qflare_client import Client, DuplicateUpdateError
from qflare_client.errors import RepeatedTaskError
from qflare_client.tasks import TaskKind
from qflare_server.storage.repository import updates
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import WEIGHTS, trained, wait_for_version
from tests.integration.secure_aggregation.test_lying_neighbors import Lie, LyingView, blank
from tests.integration.secure_aggregation.test_neighbors import (
    mean_of,
    session_of,
    take_step,
    train,
    until,
)

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

DEVICES: Final = 6


class CountingView(LyingView):
    """Counts the steps that devices send."""

    def __init__(self, address: str) -> None:
        self.step_count = 0
        super().__init__(address)

    def _changed(self, method: Any, data: bytes) -> bytes:
        self.step_count += method.name == "SecureAggregationStep"
        return super()._changed(method, data)


class Copies:
    """Copies of a device's key store, used while the device goes on."""

    def __init__(self, made: Deployment, liar: CountingView) -> None:
        self._made, self._liar, self._count = made, liar, 0

    def make(self) -> str:
        """Copy the key store as it is, and return the copy's name."""
        self._count += 1
        name = f"copy-{self._count}"
        shutil.copytree(self._made.folder / "victim", self._made.folder / name)
        return name

    @contextmanager
    def open(self, name: str) -> Iterator[Client]:
        """Open a copy; whatever it is shown, it may send no step."""
        sent = self._liar.step_count
        home = self._made.folder / name
        with Client(home=home, address=self._liar.address, insecure=True) as client:
            yield client
        self._liar.lie = lambda _: None
        assert self._liar.step_count == sent

    def leaves(self, name: str, session_id: str, lie: Lie) -> None:
        """Check that a copy leaves the round alone that it is shown."""
        with self.open(name) as copy:
            self._liar.lie = lie
            assert copy.get_task(session_id).kind is TaskKind.WAIT


def test_a_copied_key_store_leaves_the_round_that_the_device_is_in(
    deploy: Callable[..., Deployment],
) -> None:
    made = deploy(worker_poll_s=0.02)
    liar = CountingView(made.coordinator.address)
    others = [made.device(f"device-{index}") for index in range(DEVICES - 1)]
    made.device("victim").close()
    copies, changes = Copies(made, liar), dict[int, Any]()
    session_id = session_of(made, DEVICES, DEVICES)
    home = made.folder / "victim"
    try:
        with Client(home=home, address=liar.address, insecure=True) as victim:
            everybody = (victim, *others)
            enrolled = copies.make()
            take_step(made, session_id, everybody, "")
            liar.lie = lambda answer: setattr(answer, "kind", calls.TASK_KIND_ADVERTISE)
            with copies.open(enrolled) as copy, pytest.raises(DuplicateUpdateError):
                copy.get_task(session_id)

            advertised = copies.make()
            copies.leaves(advertised, session_id, lambda _: None)
            take_step(made, session_id, everybody, "has_shares")
            shared = copies.make()
            task = until(victim, session_id, lambda task: task.kind is TaskKind.TRAIN)
            prepared = copies.make()
            for index, client in enumerate(everybody):
                train(client, session_id, index, changes)
            for name in (shared, prepared):
                copies.leaves(name, session_id, liar.show(calls.TASK_KIND_TRAIN, lambda _: None))
            with copies.open(prepared) as copy:
                base = copy.download_base(task)
                arrays = trained(base.arrays, 9)
                with pytest.raises(RepeatedTaskError):
                    copy.sign_update(task, base, arrays, 10, {"loss": 1.0})

            masked = copies.make()
            take_step(made, session_id, everybody, "has_confirmed")
            copies.leaves(
                masked, session_id, liar.show(calls.TASK_KIND_CONFIRM, blank("survivors", 1))
            )
            confirmed = copies.make()
            take_step(made, session_id, (victim,), "has_revealed")
            copies.leaves(confirmed, session_id, liar.show(calls.TASK_KIND_REVEAL, lambda _: None))
            take_step(made, session_id, others, "has_revealed")
            model = wait_for_version(victim, session_id, 1)
    finally:
        liar.close()
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
    with made.coordinator.parts.database.read() as session:
        accepted = updates.accepted_after(session, session_id, 1, 0, 100)
    assert len({update.device_id for update in accepted}) == len(accepted) == DEVICES
