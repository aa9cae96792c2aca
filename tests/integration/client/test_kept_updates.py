"""Finished updates that outlive outages and processes: trained once, sent once, the same bytes."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.tensors import CHUNK_BYTES, Array
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import security_pb2, training_pb2
from qflare_client import (
    Client,
    Receipt,
    RetryPolicy,
    RoundNotOpenError,
    SecureAggregation,
    Task,
    TrainingTask,
    UnavailableError,
    enroll,
    run,
)
from qflare_client import loop as client_loop
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.rotation import rotate_online
from qflare_server.keys.secret_files import Cost
from tests.integration.client.test_device import wait_for_training
from tests.support.line import Line

Deploy = Callable[..., Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
DELTA = training_pb2.UPDATE_KIND_DELTA
ONE_ATTEMPT = RetryPolicy(total_time_s=0)
SMALL, LARGE = 8, 700_000
TRANSFERS = {
    "weights": training_pb2.TransferPolicy(),
    "delta": training_pb2.TransferPolicy(update_kind=DELTA),
    "int8": training_pb2.TransferPolicy(
        update_kind=DELTA, update_encoding=training_pb2.ENCODING_INT8
    ),
    "top-k": training_pb2.TransferPolicy(
        update_kind=DELTA, update_encoding=training_pb2.ENCODING_TOP_K, top_k_fraction=0.5
    ),
    "sealed": training_pb2.TransferPolicy(sealed=True),
}


class Bench:
    """A coordinator, a relay before it that loses what a test says, and the key store of one device."""

    def __init__(self, deployment: Any, between: Any, home: Path) -> None:
        self.deployment = deployment
        self.relay = between
        self.home = home
        self.trained_count = 0
        enroll(deployment.bundle(), home=home)

    def client(self, **settings: Any) -> Client:
        return Client(
            home=self.home, address=self.relay.address, **{"retry": ONE_ATTEMPT, **settings}
        )

    def train(self, arrays: dict[str, Array], _: TrainingTask) -> Any:
        self.trained_count += 1
        return changed(arrays), 3, {"loss": 0.5}

    def lose(self, method: str = "SubmitUpdate", *, answer: bool = False) -> None:
        """Lose the calls of a method, or only their answers."""

        def unavailable(_: Any) -> Any:
            raise UnavailableError("lost")

        (self.relay.on_answer if answer else self.relay.on_request)[method] = unavailable

    def mend(self) -> None:
        self.relay.on_request.clear()
        self.relay.on_answer.clear()

    @property
    def files(self) -> list[Path]:
        return sorted(self.home.glob("update-*"))


def changed(arrays: dict[str, Array]) -> dict[str, Array]:
    """Stand for a training."""
    return {
        name: array + np.arange(array.size, dtype=array.dtype).reshape(array.shape)
        for name, array in arrays.items()
    }


@pytest.fixture
def bench(deploy: Deploy, relay: Callable[[str], Any], tmp_path: Path) -> Bench:
    deployment = deploy(upload_batch_bytes=CHUNK_BYTES)
    return Bench(deployment, relay(deployment.coordinator.address), tmp_path / "device")


def test_a_policy_for_secure_aggregation_drops_what_was_kept_without_masks(bench: Bench) -> None:
    session_id = bench.deployment.session({"w": np.zeros(SMALL, np.float32)}, rounds=ONE_DEVICE)
    leave_unsent(bench, session_id)
    bench.mend()
    policy = SecureAggregation(min_cohort=2, helper_key_ids={"0" * 64})
    with bench.client(secure_aggregation=policy) as client:
        assert client.send_kept() == []
        assert bench.files == []
    with bench.client() as client:
        assert client.get_task(session_id).round_number == 1, "nothing was accepted"


def leave_unsent(bench: Bench, session_id: str, **settings: Any) -> Task:
    """Train once, in a process that ends while the coordinator is away."""
    bench.lose()
    with bench.client(**settings) as client:
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        with pytest.raises(UnavailableError):
            client.submit(task, base, *bench.train(base.arrays, task.config))
    bench.mend()
    return task


def test_an_outage_at_the_upload_costs_no_training(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_loop, "_OUTAGE_DELAY_S", 0.1)
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=2)
    refusals = iter(range(4))

    def away(message: Any) -> Any:
        if next(refusals, None) is not None:
            raise UnavailableError("away")
        return message

    bench.relay.on_request["SubmitUpdate"] = away
    receipts: list[Receipt] = []
    with bench.client() as client:
        summary = run(
            client, bench.train, training_session_id=session_id, on_receipt=receipts.append
        )

    assert (summary.update_count, bench.trained_count, len(receipts)) == (2, 2, 2)
    assert bench.files == []


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("form", TRANSFERS)
def test_an_update_outlives_its_process(bench: Bench, form: str, size: int) -> None:
    weights: dict[str, Array] = {"w": np.zeros(size, np.float32), "n": np.array(3, np.int64)}
    session_id = bench.deployment.session(
        weights, rounds=ONE_DEVICE, total_rounds=1, transfer=TRANSFERS[form]
    )
    leave_unsent(bench, session_id)
    assert len(bench.files) == 1

    receipts: list[Receipt] = []
    with bench.client() as client:
        summary = run(
            client, bench.train, training_session_id=session_id, on_receipt=receipts.append
        )
        got = client.download(session_id)
        proof = client.contribution_proof(receipts[0])

    assert (summary.update_count, bench.trained_count) == (1, 1)
    assert proof.version == got.version == 1
    assert bench.files == []
    wanted = changed(weights)
    if form == "top-k":  # the upper half was sent
        wanted["w"][: size // 2] = 0
    np.testing.assert_allclose(
        got.arrays["w"], wanted["w"], atol=size / 127 if form == "int8" else 0
    )
    assert got.arrays["n"] == 3


def test_what_a_top_k_update_leaves_out_counts_when_it_is_sent_by_a_later_process(
    bench: Bench,
) -> None:
    session_id = bench.deployment.session(
        {"w": np.zeros(SMALL, np.float32)},
        rounds=ONE_DEVICE,
        total_rounds=2,
        transfer=TRANSFERS["top-k"],
    )
    leave_unsent(bench, session_id)

    with bench.client() as client:
        client.send_kept()
        base = client.download(session_id)
        assert client._feedback is not None
        left_out = client._feedback.residual(session_id, base.manifest)["w"].copy()

    np.testing.assert_array_equal(left_out, [0, 1, 2, 3, 0, 0, 0, 0])


def test_a_receipt_that_was_lost_is_had_by_the_next_process(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    bench.lose(answer=True)
    with bench.client() as client:
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        with pytest.raises(UnavailableError):
            client.submit(task, base, changed(base.arrays), 3)
    bench.mend()

    with bench.client() as client:
        (outcome,) = client.send_kept()
        assert isinstance(outcome, Receipt)
        assert outcome.acceptance_sequence == 1
    assert bench.files == []


def test_an_update_whose_round_has_closed_is_dropped(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    leave_unsent(bench, session_id)
    bench.deployment.admin.CancelTrainingSession(
        admin_pb2.CancelTrainingSessionRequest(training_session_id=session_id, reason="test"),
        metadata=bench.deployment.metadata,
    )

    with bench.client() as client:
        summary = run(client, bench.train, training_session_id=session_id)

    assert (summary.update_count, summary.late_count, bench.trained_count) == (0, 1, 1)
    assert bench.files == []


def test_the_same_submit_again_sends_what_was_trained_first(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    task = leave_unsent(bench, session_id)

    with bench.client() as client:
        base = client.download_base(task)
        receipt = client.submit(task, base, base.arrays, 99)

    statement = security_pb2.UpdateStatement.FromString(receipt.statement.payload)
    assert (statement.example_count, dict(statement.metrics)) == (3, {"loss": 0.5})


def test_a_refusal_is_raised_by_the_same_submit_again(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    task = leave_unsent(bench, session_id)
    bench.deployment.admin.CancelTrainingSession(
        admin_pb2.CancelTrainingSessionRequest(training_session_id=session_id, reason="test"),
        metadata=bench.deployment.metadata,
    )

    with bench.client() as client:
        base = client.download_base(task)
        with pytest.raises(RoundNotOpenError):
            client.submit(task, base, base.arrays, 99)
    assert bench.files == []


@pytest.mark.parametrize("form", ["weights", "sealed"])
def test_keys_that_change_meanwhile_make_another_signature(bench: Bench, form: str) -> None:
    session_id = bench.deployment.session(
        {"w": np.zeros(LARGE, np.float32)},
        rounds=ONE_DEVICE,
        total_rounds=1,
        transfer=TRANSFERS[form],
    )
    leave_unsent(bench, session_id)

    with bench.client() as client:
        client.rotate_keys()
        (outcome,) = client.send_kept()

    assert isinstance(outcome, Receipt)
    statement = security_pb2.UpdateStatement.FromString(outcome.statement.payload)
    assert statement.key_id == client._login.identity.keys.signing.public.key_id


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_key_of_a_kept_update_is_wrapped_anew_when_the_coordinators_key_has_changed(
    bench: Bench, size: int
) -> None:
    weights = {"w": np.zeros(size, np.float32)}
    session_id = bench.deployment.session(
        weights, rounds=ONE_DEVICE, total_rounds=1, transfer=TRANSFERS["sealed"]
    )
    leave_unsent(bench, session_id)
    parts = bench.deployment.coordinator.parts
    folder = KeyFolder(
        KeyFolder.from_config(bench.deployment.config).directory,
        cost=Cost(iterations=1, memory_kib=1024, lanes=1),
    )
    for _ in range(3):
        rotate_online(folder, parts.database, parts.context.clock())
    parts.keys._look()

    with bench.client() as client:
        summary = run(client, bench.train, training_session_id=session_id)
        got = client.download(session_id)

    assert (summary.update_count, bench.trained_count) == (1, 1)
    np.testing.assert_array_equal(got.arrays["w"], changed(weights)["w"])


def damaged(data: bytes) -> Iterator[bytes]:
    """Yield ways in which a file is damaged."""
    step = max(1, len(data) // 12)
    yield b""
    for place in range(0, len(data), step):
        yield data[:place]
        yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield data[:-1]


@pytest.mark.parametrize("form", ["weights", "sealed"])
def test_a_damaged_update_is_dropped_and_never_sent(bench: Bench, form: str) -> None:
    session_id = bench.deployment.session(
        {"w": np.zeros(LARGE, np.float32)},
        rounds=ONE_DEVICE,
        total_rounds=1,
        transfer=TRANSFERS[form],
    )
    leave_unsent(bench, session_id)
    (file,) = bench.files
    data = file.read_bytes()

    for spoiled in damaged(data):
        file.write_bytes(spoiled)
        with bench.client() as client:
            outcomes = client.send_kept()
        assert not any(isinstance(outcome, Receipt) for outcome in outcomes), len(spoiled)
        assert bench.files == []
        file.write_bytes(data)
        file.chmod(0o600)

    with bench.client() as client:
        (outcome,) = client.send_kept()
        assert isinstance(outcome, Receipt)


def test_an_update_that_cannot_be_kept_is_sent_all_the_same(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)
    leave_unsent(bench, session_id)
    (file,) = bench.files
    file.unlink()
    (file / "in the way").mkdir(parents=True)

    with bench.client() as client:
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        receipt = client.submit(task, base, changed(base.arrays), 3)

    assert receipt.acceptance_sequence == 1


def test_nothing_is_kept_of_a_client_that_does_not_want_it(bench: Bench) -> None:
    session_id = bench.deployment.session(rounds=ONE_DEVICE, total_rounds=1)

    leave_unsent(bench, session_id, keep_updates=False)

    assert bench.files == []


def test_a_kept_update_is_as_secret_as_the_keys(
    deploy: Deploy, relay: Callable[[str], Any], tmp_path: Path
) -> None:
    deployment = deploy()
    home = tmp_path / "device"
    between = relay(deployment.coordinator.address)
    enroll(deployment.bundle(), home=home, passphrase="correct horse")
    session_id = deployment.session({"w": np.zeros(64, np.float32)}, rounds=ONE_DEVICE)
    mark = np.full(64, 0.123456789, np.float32)

    def unavailable(_: Any) -> Any:
        raise UnavailableError("lost")

    between.on_request["SubmitUpdate"] = unavailable
    with Client(
        home=home, address=between.address, passphrase="correct horse", retry=ONE_ATTEMPT
    ) as client:
        task = wait_for_training(client, session_id)
        base = client.download_base(task)
        with pytest.raises(UnavailableError):
            client.submit(task, base, {"w": mark}, 3, {"accuracy": 0.5})

    (file,) = home.glob("update-*")
    data = file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert mark[:4].tobytes() not in data
    assert session_id.encode() not in data
    assert b"accuracy" not in data


DEVICE = """
import sys
from pathlib import Path
import numpy as np
from qflare_client import Client, run

def train(arrays, config):
    return {name: array + 1 for name, array in arrays.items()}, 3, {}

if __name__ == "__main__":
    def progress(what, done_bytes, total_bytes):
        if what == "upload":
            print(done_bytes, flush=True)
    with Client(home=Path(sys.argv[1]), address=sys.argv[2], progress=progress) as client:
        run(client, train)
"""


def test_a_device_that_is_killed_in_the_middle_of_an_upload_goes_on_there(
    bench: Bench, tmp_path: Path
) -> None:
    weights = {"w": np.zeros(16 * CHUNK_BYTES // 4, np.float32)}
    session_id = bench.deployment.session(weights, rounds=ONE_DEVICE, total_rounds=1)
    program = tmp_path / "device.py"
    program.write_text(DEVICE)

    with Line(bench.deployment.coordinator.address, bytes_per_s=10 * CHUNK_BYTES) as line:
        command = [sys.executable, str(program), str(bench.home), line.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if int(text) == 14 * CHUNK_BYTES:
                    break
            process.kill()

    told: list[int] = []
    with bench.client(progress=lambda *step: told.append(step[1])) as client:
        (outcome,) = client.send_kept()
        assert isinstance(outcome, Receipt)
        got = wait_for_version(client, session_id)
    assert told[0] > CHUNK_BYTES
    np.testing.assert_array_equal(got["w"], weights["w"] + 1)


def wait_for_version(client: Client, session_id: str) -> dict[str, Array]:
    for _ in range(500):
        model = client.download(session_id)
        if model.version:
            return model.arrays
        threading.Event().wait(0.02)
    raise AssertionError("no version")
