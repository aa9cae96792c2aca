"""Models of 100 MB: how fast they go in and out, what they cost in memory, and whom they keep waiting."""

import io
import statistics
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event

import psycopg2

from qflare.v1 import training_pb2
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import SUBMIT, Model, download, polls, submissions
from tests.bench.figures import MB, Figure, Latencies, megabytes, percent, throughput
from tests.bench.load import Call, closed_loop, paced, sequence
from tests.bench.process import ServerProcess
from tests.bench.small_operations import NO_SIGNATURES, SMALL, start_unbounded

LARGE_BYTES = 100 * MB
SMALL_CALLS_PER_SECOND = 100.0
ALONE_CALLS = 300
UPLOADS_BEGIN_S = 60.0
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)


def uploads(lab: Laboratory) -> Iterator[Figure]:
    """Submit 100 MB: durable and checked when it is acknowledged."""
    model, repeats = Model(LARGE_BYTES), lab.times(5, 2)
    for backend in Backend:
        done, bound = _upload(lab, backend, model, repeats)
        if backend is Backend.POSTGRESQL:
            ceiling_s, name, goal = copy_alone(lab, model), "binary COPY alone", 0.8
        else:
            ceiling_s, name, goal = bound, "raw stream", 0.6
        yield Figure(
            f"submit 100 MB, {backend}",
            throughput(LARGE_BYTES, done),
            f"{name}: {throughput(LARGE_BYTES, ceiling_s)}",
            percent(ceiling_s / done),
            f">= {percent(goal)}",
            ceiling_s / done >= goal,
        )


def _upload(lab: Laboratory, backend: Backend, model: Model, repeats: int) -> tuple[float, float]:
    """Return the median seconds of an upload to a coordinator and to the sink."""
    with lab.coordinator(backend) as coordinator, lab.sink() as sink:
        calls = _prepare(coordinator, model, repeats)
        return in_turns((coordinator.process, sink), (calls, calls))


def in_turns(
    servers: tuple[ServerProcess, ServerProcess], calls: tuple[list[Call], list[Call]]
) -> tuple[float, float]:
    """Make calls one by one to two servers in turns, each when the work of those before is done.

    Returns:
        The median of each in seconds.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in zip(*calls, strict=True):
        for server, call, taken in zip(servers, pair, seconds, strict=True):
            server.settle()
            taken.extend(sequence(server.address, [call]).seconds)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _prepare(
    coordinator: Coordinator, model: Model, count: int, *, signed: bool = True
) -> list[Call]:
    session_id = start_unbounded(coordinator, model)
    devices = coordinator.population.devices(count)
    return submissions(coordinator, session_id, devices, model, with_signatures=signed)


def copy_alone(lab: Laboratory, model: Model) -> float:
    """Return the seconds in which PostgreSQL takes the same chunks in by COPY, and commits."""
    rows = b"".join(
        struct.pack(">hiii", 2, 4, index, len(chunk)) + chunk
        for index, chunk in enumerate(model.chunks)
    )
    data = COPY_HEADER + rows + COPY_TRAILER
    with lab.temporary() as folder, lab.database_url(Backend.POSTGRESQL, folder) as url:
        connection = psycopg2.connect(url.replace("+psycopg2", ""))
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE chunk (number integer, data bytea)")
            cursor.execute("ALTER TABLE chunk ALTER data SET STORAGE EXTERNAL")
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            with connection, connection.cursor() as cursor:
                statement = "COPY chunk FROM STDIN (FORMAT binary)"
                cursor.copy_expert(statement, io.BytesIO(data), size=2**20)
            seconds.append(time.perf_counter() - started)
        connection.close()
        return sorted(seconds)[1]


def downloads(lab: Laboratory) -> Iterator[Figure]:
    """Get a model of 100 MB."""
    model, repeats = Model(LARGE_BYTES), lab.times(7, 3)
    for backend, goal in ((Backend.SQLITE, 0.8), (Backend.POSTGRESQL, 0.6)):
        with lab.coordinator(backend) as coordinator, lab.sink(LARGE_BYTES) as source:
            session_id = start_unbounded(coordinator, model)
            device = coordinator.population.devices(1)[0]
            calls = [download(device, session_id)] * repeats
            done_s, bound_s = in_turns((coordinator.process, source), (calls, calls))
            yield Figure(
                f"get a 100 MB model, {backend}",
                throughput(LARGE_BYTES, done_s),
                f"raw stream: {throughput(LARGE_BYTES, bound_s)}",
                percent(bound_s / done_s),
                f">= {percent(goal)}",
                bound_s / done_s >= goal,
            )


def signed_uploads(lab: Laboratory) -> Iterator[Figure]:
    """What a signature costs an upload of 100 MB."""
    model, repeats = Model(LARGE_BYTES), lab.times(5, 2)
    with (
        lab.coordinator(Backend.SQLITE) as strict,
        lab.coordinator(Backend.SQLITE, NO_SIGNATURES) as lax,
    ):
        calls = (_prepare(strict, model, repeats), _prepare(lax, model, repeats, signed=False))
        signed_s, unsigned_s = in_turns((strict.process, lax.process), calls)
    share = unsigned_s / signed_s
    yield Figure(
        "submit 100 MB signed, SQLite",
        throughput(LARGE_BYTES, signed_s),
        f"unsigned: {throughput(LARGE_BYTES, unsigned_s)}",
        percent(share),
        ">= 85%",
        share >= 0.85,
    )


def crowding(lab: Laboratory) -> Iterator[Figure]:
    """How long small operations wait while four devices upload 100 MB each, here and on a server that does nothing."""
    count = lab.times(1500, 900)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator, lab.sink() as sink:
            large = _prepare(coordinator, Model(LARGE_BYTES), 4 * lab.times(6, 3))
            small = _small_calls(coordinator, ALONE_CALLS + count)
            alone = paced(coordinator.address, small[:ALONE_CALLS], SMALL_CALLS_PER_SECOND, 8)
            coordinator.process.settle()
            heads = [(call.messages[0], call.token) for call in large]
            bound, bound_uploads = _beside_uploads(sink.address, small[ALONE_CALLS:], heads)
            done, uploads = _beside_uploads(coordinator.address, small[ALONE_CALLS:], heads)
            yield Figure(
                f"poll, submit and get of 10 KB while four 100 MB uploads run, {backend}",
                _crowded(done, len(heads), uploads),
                f"no-op server: {_crowded(bound, len(heads), bound_uploads)};"
                f" alone: p50 {alone.median_ms:.1f} ms, p99 {alone.quantile_ms(0.99):.1f} ms",
                goal="p99 < 50 ms",
                reached=done.quantile_ms(0.99) < 50,
            )


def _crowded(small: Latencies, model_count: int, uploads: Latencies) -> str:
    """Return the latencies of small calls, and the rate of the uploads beside them."""
    rate = throughput(model_count * LARGE_BYTES, uploads.elapsed_s)
    return (
        f"p50 {small.median_ms:.1f} ms, p99 {small.quantile_ms(0.99):.1f} ms"
        f" ({len(small.seconds)} calls; uploads {rate})"
    )


def _small_calls(coordinator: Coordinator, count: int) -> list[Call]:
    """Return a mixture of small calls, each update from a device of its own."""
    session_id = start_unbounded(coordinator, SMALL)
    devices = coordinator.population.devices(count // 3 + 1)
    updates = iter(submissions(coordinator, session_id, devices, SMALL))
    asks = iter(polls(devices, session_id))
    gets = iter([download(device, session_id) for device in devices])
    return [next((updates, asks, gets)[number % 3]) for number in range(count)]


def _beside_uploads(
    address: str, small: list[Call], heads: list[tuple[bytes, str]]
) -> tuple[Latencies, Latencies]:
    """Make small calls while models are uploaded, and return the latencies of both.

    The uploads come from a process of their own. Small calls begin with the first chunks, not while that process
    starts, and none is made after the last receipt.
    """
    context = get_context("spawn")
    began = context.Event()
    with ProcessPoolExecutor(1, context, _note_event, (began,)) as pool:
        uploading = pool.submit(upload_all, address, heads, LARGE_BYTES)
        if not began.wait(UPLOADS_BEGIN_S):
            raise RuntimeError("the uploads have not begun")
        done = paced(address, small, SMALL_CALLS_PER_SECOND, 8, until=uploading.done)
        return done, uploading.result()


_begins: list[Event] = []


def _note_event(event: Event) -> None:
    """Remember, in the process of the uploads, what it sets when they begin."""
    _begins.append(event)


def upload_all(address: str, heads: list[tuple[bytes, str]], size_bytes: int) -> Latencies:
    """Upload one model for each signed head, four at once; runs in a process of its own."""
    messages = Model(size_bytes).chunk_messages
    calls = [Call(SUBMIT, (head, *messages), token) for head, token in heads]
    for event in _begins:
        event.set()
    return closed_loop(address, calls, 4)


def memory(lab: Laboratory) -> Iterator[Figure]:
    """Most memory that the coordinator holds while eight devices submit 100 MB each, and while it folds them."""
    bound_bytes = 300 * MB + 3 * LARGE_BYTES
    model = Model(LARGE_BYTES)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            session_id = coordinator.admin.start_session(
                model.manifest,
                model.payload,
                training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=8)),
            )
            devices = coordinator.population.devices(8)
            calls = submissions(coordinator, session_id, devices, model)
            idle_bytes = coordinator.process.peak_bytes()
            closed_loop(coordinator.address, calls, 8)
            coordinator.admin.await_version(session_id, 1)
            peak_bytes = coordinator.process.peak_bytes()
            yield Figure(
                f"peak memory, 8 devices submit 100 MB each and they are folded, {backend}",
                megabytes(peak_bytes),
                f"before: {megabytes(idle_bytes)}",
                goal=f"< {megabytes(bound_bytes)}",
                reached=peak_bytes < bound_bytes,
            )
