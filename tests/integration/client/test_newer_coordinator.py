"""A coordinator of a later release, whose answers hold enum numbers that this SDK does not know.

Every enum field of every answer is set to an unknown number in turn, inside of signed documents too. The SDK either
does not need the field, or raises an error of its own that says what to upgrade.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qflare.v1 import training_pb2
from qflare_client import Client, QflareClientError, Receipt, enroll
from qflare_client.rpc.retry import RetryPolicy
from qflare_server.keys.folder import KeyFolder
from tests.integration.client.test_device import ONE_DEVICE, take_part, wait_for_training
from tests.integration.secure_aggregation.test_neighbors import session_of, take_step, train
from tests.support.newer_coordinator import NewerCoordinator, enum_paths

Deploy = Callable[..., Any]
NOT_NEEDED = {
    # For the coordinator alone, or shown to people as it is.
    "GetTask.task.!.transfer.payload_retention",
    "GetTask.transfer.payload_retention",
    "Heartbeat.state",
    # The keyset in force has the keys of all receipts.
    "GetTask.neighbors.earlier_keysets.signatures.algorithm",
    # The signed statement decides.
    "GetGlobalModel.header.global_model.download.encoding",
}
ENROLLMENT = ("GetKeyset", "Register")


class Walk:
    """One device that has trained a version, and the coordinator behind its later release."""

    def __init__(self, deployment: Any, folder: Path) -> None:
        self._deployment = deployment
        self._folder = folder
        self._number = 0
        keys = KeyFolder(deployment.config.data_dir / "keys")
        signers = [*keys.read_root().signing_keys(), *keys.read_online().signing_keys()]
        client, other = deployment.device("original"), deployment.device("other")
        third = deployment.device("third")
        signers += [each._login.identity.keys.signing for each in (other, third)]
        other.rotate_keys()
        signers.append(other._login.identity.keys.signing)
        self.newer = NewerCoordinator(deployment.coordinator.address, signers)
        self._done = deployment.session(
            rounds=ONE_DEVICE,
            total_rounds=3,
            transfer=training_pb2.TransferPolicy(download_encoding=training_pb2.ENCODING_FLOAT16),
        )
        self._receipt: Receipt = take_part(client, self._done)
        take_part(other, self._done)  # a version between the one that the device knows and the last
        wait_for_training(other, self._done)
        self._open = deployment.session(rounds=training_pb2.RoundPolicy(quorum=2))
        self._groups = self._wait_in_groups([client, other, third])
        client.close()

    def _wait_in_groups(self, clients: list[Client]) -> dict[str, str]:
        """Return training sessions by the field that they show the device of the group in which it is."""
        made = {
            field: session_of(self._deployment, 3, 3, corrupt_fraction=0.1)
            for field in ("members", "boxes", "confirmations")
        }
        for session_id in made.values():
            take_step(self._deployment, session_id, clients, "")
        take_step(self._deployment, made["boxes"], clients, "has_shares")
        session_id = made["confirmations"]
        take_step(self._deployment, session_id, clients, "has_shares")
        for index, each in enumerate(clients):
            train(each, session_id, index, {})
        take_step(self._deployment, session_id, clients, "has_confirmed")
        return made | {"earlier_keysets": made["members"]}

    def home(self) -> Path:
        """Return a copy of the device's key store with the same lock file: another one would tell that it is a copy."""
        self._number += 1
        original, copy = self._folder / "original", self._folder / f"{self._number}"
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns("lock"))
        (copy / "lock").hardlink_to(original / "lock")
        return copy

    def use_everything(self) -> None:
        """Make every call of a device that answers with an enum; take part in groups only where one is changed."""
        with Client(
            home=self.home(), address=self.newer.address, retry=RetryPolicy(total_time_s=5)
        ) as client:
            if self.newer.path.startswith("GetTask.neighbors."):
                client.get_task(self._groups[self.newer.path.split(".")[2]])
                return
            client.heartbeat()
            task = client.get_task(self._open)
            base = client.download_base(task)
            if "update_" in self.newer.path:  # an accepted update would leave no task to the next
                client.submit(task, base, base.arrays, 10)
            client.download(self._done)
            client.lineage(self._done)
            client.contribution_proof(self._receipt)
            client.audit_head()
            client.evidence(self._done, [self._receipt])

    def enroll(self) -> None:
        """Enroll a device."""
        self._number += 1
        enroll(
            self._deployment.bundle(),
            home=self._folder / f"{self._number}",
            address=self.newer.address,
            retry=RetryPolicy(total_time_s=5),
        )


@pytest.fixture
def walk(deploy: Deploy, tmp_path: Path) -> Iterator[Walk]:
    found = Walk(deploy(), tmp_path)
    yield found
    found.newer.close()


def outcome(walk: Walk, path: str) -> str:
    """Return what the SDK says of an unknown number in a field; nothing where it does not mind."""
    walk.newer.pretend(path)
    try:
        if path.startswith(ENROLLMENT):
            walk.enroll()
        else:
            walk.use_everything()
    except QflareClientError as error:
        return str(error)
    return ""


def test_unknown_numbers_are_errors_that_say_to_upgrade(walk: Walk) -> None:
    assert outcome(walk, "") == ""
    ignored, unreached, unexplained = set(), set(), {}
    for path in enum_paths():
        said = outcome(walk, path)
        if not walk.newer.change_count:
            unreached.add(path)
        elif not said:
            ignored.add(path)
        elif "upgrade qflare" not in said:
            unexplained[path] = said

    assert unexplained == {}
    assert unreached == set()
    assert ignored == NOT_NEEDED
