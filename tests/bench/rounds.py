"""Whole rounds: from the last update to the version, and from one version to the next."""

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from qflare.crypto.signing import SigningKey
from qflare.tensors import Array
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, training_pb2
from qflare_client import Client, TrainingTask, enroll, run
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import (
    Model,
    download,
    polls,
    signed,
    statement_of,
    submission,
    submissions,
)
from tests.bench.figures import KB, MB, Figure, milliseconds
from tests.bench.handshakes import bundle_of
from tests.bench.load import Call, Connection, closed_loop, connections
from tests.bench.population import BenchDevice

SMALL = Model(10 * KB)
CLOSING_RATIO = 1.5
SHAPES = ((10, 100 * KB, 0.15), (100, 100 * KB, 1.0), (10, 10 * MB, 0.8), (4, 100 * MB, 2.0))
PEER_S = {
    (10, 100 * KB): "13 s",
    (100, 100 * KB): "never ends",
    (10, 10 * MB): "13 s",
    (4, 100 * MB): "20 s",
}


def start(coordinator: Coordinator, model: Model, quorum: int, round_count: int) -> str:
    """Start a training session of so many rounds, each closed by its last update."""
    config = training_pb2.TrainingConfig(
        total_rounds=round_count,
        rounds=training_pb2.RoundPolicy(quorum=quorum, deadline=Duration(seconds=3600)),
    )
    return coordinator.admin.start_session(model.manifest, model.payload, config)


def closing(lab: Laboratory) -> Iterator[Figure]:
    """From the last update of a round to the version that devices can get."""
    repeats = lab.times(7, 5)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            medians = _close(coordinator, (10, 100, 1000), repeats)
            for count in (100, 1000):
                ratio = medians[count] / medians[10]
                yield Figure(
                    f"from the last of {count} updates of 10 KB to the version, {backend}",
                    milliseconds(medians[count]),
                    f"of 10 updates: {milliseconds(medians[10])}",
                    f"{ratio:.1f} x",
                    f"<= {CLOSING_RATIO:g} x",
                    ratio <= CLOSING_RATIO,
                )


def _close(coordinator: Coordinator, counts: Sequence[int], repeats: int) -> dict[int, float]:
    """Return the median time from the last acknowledgement to the next version, by the number of a round's updates.

    The sizes take turns, so that other load on the machine falls on all of them.
    """
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    sessions = {count: start(coordinator, SMALL, count, repeats + 1) for count in counts}
    for _ in range(repeats):
        for count, session_id in sessions.items():
            devices = coordinator.population.devices(count)
            calls = submissions(coordinator, session_id, devices, SMALL)
            closed_loop(coordinator.address, calls[:-1], 16)
            coordinator.process.settle()
            ask = polls(devices[:1], session_id)[0]
            seconds[count].append(
                asyncio.run(time_publication(coordinator.address, calls[-1], ask))
            )
    return {count: statistics.median(found) for count, found in seconds.items()}


async def time_publication(address: str, last: Call, ask: Call, pause_s: float = 0.001) -> float:
    """Send the last update, then ask for the next task until there is one, with pauses."""
    async with connections(address, 1) as opened:
        await opened[0].send(last)
        acknowledged = time.perf_counter()
        while True:
            answer = pb.GetTaskResponse.FromString(await opened[0].send(ask))
            if answer.kind == pb.TASK_KIND_TRAIN:
                return time.perf_counter() - acknowledged
            await asyncio.sleep(pause_s)


def whole(lab: Laboratory) -> Iterator[Figure]:
    """Rounds without training: poll, download, sign, upload, fold, publish."""
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            for count, size_bytes, goal_s in SHAPES:
                round_count = lab.times(5, 2) if size_bytes >= 10 * MB else lab.times(20, 5)
                model = Model(size_bytes)
                session_id = start(coordinator, model, count, round_count + 1)
                devices = coordinator.population.devices(count)
                took_s = asyncio.run(play_rounds(coordinator, devices, model, session_id))
                yield round_figure(
                    f"round of {count} x {size_bytes / MB:g} MB, {backend}, devices without SDK",
                    took_s / round_count,
                    goal_s,
                    PEER_S[count, size_bytes],
                    no_op_round(lab, model, count),
                )


def no_op_round(lab: Laboratory, model: Model, count: int) -> float:
    """Return the seconds in which as many devices poll, download and upload at a server that does nothing."""
    device = BenchDevice("0" * 36, "token", SigningKey.generate())
    calls = (
        polls([device], "")[0],
        download(device, ""),
        submission(security_pb2.SignedEnvelope(payload=bytes(700)), device, model),
    )

    async def one(connection: Connection) -> None:
        for call in calls:
            await connection.send(call)

    async def everybody(address: str) -> float:
        async with connections(address, count) as opened:
            begun = time.perf_counter()
            await asyncio.gather(*(one(connection) for connection in opened))
            return time.perf_counter() - begun

    with lab.sink(model.size_bytes) as sink:
        return min(asyncio.run(everybody(sink.address)) for _ in range(3))


def round_figure(
    what: str,
    seconds: float,
    goal_s: float | None = None,
    peer: str = "",
    bound_s: float | None = None,
) -> Figure:
    """Return the row of a round that took so long, beside what a server that does nothing took."""
    return Figure(
        what,
        milliseconds(seconds),
        f"no-op server: {milliseconds(bound_s)}" if bound_s else "",
        f"{seconds / bound_s:.1f} x" if bound_s else "",
        goal="" if goal_s is None else f"< {goal_s:g} s" + (f" (a peer: {peer})" if peer else ""),
        reached=None if goal_s is None else seconds < goal_s,
    )


async def play_rounds(
    coordinator: Coordinator,
    devices: Sequence[BenchDevice],
    model: Model,
    session_id: str,
) -> float:
    """Let devices take part in all rounds; return the seconds from the second round on.

    A device waits as long as the coordinator says when there is nothing to do.
    """
    begun: dict[int, float] = {}

    async def device(who: BenchDevice, connection: Connection) -> None:
        ask, get = polls([who], session_id)[0], download(who, session_id)
        while True:
            task = pb.GetTaskResponse.FromString(await connection.send(ask))
            if task.kind == pb.TASK_KIND_DONE:
                return
            if task.kind != pb.TASK_KIND_TRAIN:
                await asyncio.sleep(task.poll_delay.ToNanoseconds() / 1e9)
                continue
            begun.setdefault(task.round_number, time.perf_counter())
            await connection.send(get)
            statement = statement_of(coordinator.config.realm, task, who, model)
            await connection.send(submission(signed(statement, who), who, model))

    async with connections(coordinator.address, len(devices)) as opened:
        await asyncio.gather(
            *(device(who, connection) for who, connection in zip(devices, opened, strict=True))
        )
    return time.perf_counter() - begun[2]


def with_sdk(lab: Laboratory) -> Iterator[Figure]:
    """The same with the device SDK: everything verified, all devices in one process and thus on one core."""
    for backend in Backend:
        with lab.coordinator(backend) as coordinator, lab.temporary() as folder:
            clients = sdk_devices(coordinator, folder, 10)
            for size_bytes, goal_s in ((100 * KB, 0.15), (10 * MB, 0.8)):
                round_count = lab.times(10, 3)
                took_s = _sdk_rounds(coordinator, clients, Model(size_bytes), round_count)
                yield round_figure(
                    f"round of 10 x {size_bytes / MB:g} MB, {backend}, with the SDK",
                    took_s / round_count,
                    goal_s,
                    PEER_S[10, size_bytes],
                )
            for client in clients:
                client.close()


def sdk_devices(coordinator: Coordinator, folder: Path, count: int) -> list[Client]:
    """Enroll devices over the network and return their clients."""
    tokens = coordinator.population.enrollment_tokens(count)
    clients = []
    for number, token in enumerate(tokens):
        home = folder / f"device-{number}"
        enroll(bundle_of(coordinator, token), home=home)
        clients.append(Client(home=home))
    return clients


def _sdk_rounds(
    coordinator: Coordinator, clients: Sequence[Client], model: Model, round_count: int
) -> float:
    """Return the seconds of so many rounds after one to warm up."""
    session_id = start(coordinator, model, len(clients), round_count + 1)
    lock, begun = threading.Lock(), dict[int, float]()

    def train(
        arrays: dict[str, Array], task: TrainingTask
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        with lock:
            begun.setdefault(task.round_number, time.perf_counter())
        return arrays, 100, {"loss": 0.25}

    with ThreadPoolExecutor(len(clients)) as pool:
        loops = [
            pool.submit(run, client, train, training_session_id=session_id) for client in clients
        ]
        for loop in loops:
            loop.result()
    return time.perf_counter() - begun[2]
