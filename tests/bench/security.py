"""What the cryptography costs: logins, sealing, signing beside other threads, proofs, the audit log."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy.orm import Session

from qflare.crypto.merkle import inclusion_proof, verify_inclusion
from qflare.crypto.sealed_payloads import (
    Direction,
    PayloadKey,
    PayloadOpener,
    PayloadSealer,
    SealContext,
)
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Provider, SigningContext, SigningKey
from qflare_server.context import utc_now
from qflare_server.storage.database import Database
from qflare_server.storage.repository import audit, audit_tree
from qflare_server.storage.repository.audit import SYSTEM, Event
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.figures import (
    MB,
    MIB,
    Figure,
    Latencies,
    milliseconds,
    per_second,
    percent,
    throughput,
)
from tests.bench.filling import ENTRY_COUNT, fill_tree, leaf
from tests.bench.handshakes import Logins
from tests.bench.load import Call, closed_loop

TICK_S = 0.001


def logins(lab: Laboratory) -> Iterator[Figure]:
    """Logins per second of one core: both halves, the tokens stored."""
    count = lab.times(600, 150)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            prepared = Logins(coordinator, coordinator.population.devices(count))
            first_s, first = _cost(coordinator, prepared.first_halves())
            second_s, second = _cost(coordinator, prepared.second_halves())
            prepared.close()
            rate = 1 / (first_s + second_s)
            yield Figure(
                f"login, {backend}, for each core of the coordinator",
                f"{per_second(rate)} ({milliseconds(first_s + second_s)} of CPU)",
                f"halves alone, 8 devices: {per_second(first.rate)}, {per_second(second.rate)}",
                goal=">= 200/s",
                reached=rate >= 200,
            )


def _cost(coordinator: Coordinator, calls: Sequence[Call]) -> tuple[float, Latencies]:
    """Return the coordinator's processor time for a call, and the latencies."""
    before = coordinator.process.cpu_s()
    done = closed_loop(coordinator.address, calls, 8)
    return (coordinator.process.cpu_s() - before) / len(calls), done


def sealing(lab: Laboratory) -> Iterator[Figure]:
    """Sealing and opening a payload of 100 MB on one core, beside the cipher alone."""
    payload, repeats = os.urandom(100 * MB), lab.times(5, 2)
    pieces = [payload[start : start + MIB] for start in range(0, len(payload), MIB)]
    cipher = AESGCM(os.urandom(32))

    def encrypt() -> None:
        for piece in pieces:
            cipher.encrypt(bytes(12), piece, None)

    bound_s = _best(repeats, encrypt)
    context = SealContext("bench", Direction.UPDATE, "session", 1, "update", "device")
    sealer = PayloadSealer(context, len(payload))
    sealed = list(sealer.seal(pieces))
    recipient = KemKey.generate()
    wrapped = sealer.key.wrap(recipient.public)

    def seal() -> None:
        for _ in PayloadSealer(context, len(payload)).seal(pieces):
            pass

    def open_all() -> None:
        key = PayloadKey.unwrap(sealer.key.header, wrapped, context, recipient.decapsulate)
        for _ in PayloadOpener(key, len(payload)).open(sealed):
            pass

    for what, work in (("sealing", seal), ("opening", open_all)):
        seconds = _best(repeats, work)
        yield Figure(
            f"{what} 100 MB, one core",
            throughput(len(payload), seconds),
            f"AES-256-GCM alone: {throughput(len(payload), bound_s)}",
            percent(bound_s / seconds),
            ">= 1 GB/s",
            len(payload) / seconds >= 1e9,
        )


def _best(repeats: int, work: Callable[[], object]) -> float:
    """Return the shortest of some runs, in seconds: what the machine can do when nobody disturbs it."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def signing(lab: Laboratory) -> Iterator[Figure]:
    """How much later other threads wake while one signs without a pause."""
    duration_s = lab.times(5, 2)
    quiet = _lateness(duration_s, None)
    delays = {
        provider: _lateness(duration_s, SigningKey.generate(provider=provider))
        for provider in (Provider.CRYPTOGRAPHY, Provider.PQCRYPTO)
    }
    delay_s = delays[Provider.CRYPTOGRAPHY] - quiet
    yield Figure(
        "delay of other threads by signing, p99",
        milliseconds(max(0.0, delay_s)),
        f"a thread that wakes every ms is late by: nobody signs {milliseconds(quiet)},"
        f" cryptography signs {milliseconds(delays[Provider.CRYPTOGRAPHY])},"
        f" pqcrypto signs {milliseconds(delays[Provider.PQCRYPTO])}",
        goal="< 2 ms",
        reached=delay_s < 2e-3,
    )


def _lateness(duration_s: float, key: SigningKey | None) -> float:
    """Return the p99 of how late a thread wakes from a sleep of one millisecond, in seconds."""
    stopped = threading.Event()

    def sign() -> None:
        while key is not None and not stopped.is_set():
            key.sign(SigningContext.UPDATE, b"statement")

    signer = threading.Thread(target=sign)
    signer.start()
    late = []
    end = time.perf_counter() + duration_s
    while (begun := time.perf_counter()) < end:
        time.sleep(TICK_S)
        late.append(time.perf_counter() - begun - TICK_S)
    stopped.set()
    signer.join()
    return sorted(late)[int(0.99 * len(late))]


def proofs(lab: Laboratory) -> Iterator[Figure]:
    """Inclusion proofs from the database, in a log of a million entries."""
    count = lab.times(ENTRY_COUNT, ENTRY_COUNT // 10)
    for backend in Backend:
        with lab.database(backend) as database:
            root = fill_tree(database, count)
            seconds = []
            for _ in range(lab.times(300, 100)):
                index = secrets.randbelow(count)
                started = time.perf_counter()
                siblings = _prove(database, index, count)
                seconds.append(time.perf_counter() - started)
                verify_inclusion(leaf(index), index, count, siblings, root)
            done = Latencies(seconds, sum(seconds))
            yield Figure(
                f"inclusion proof in an audit log of {count:,} entries, {backend}",
                f"p50 {done.median_ms:.2f} ms, p99 {done.quantile_ms(0.99):.2f} ms",
                goal="< 2 ms",
                reached=done.median_ms < 2,
            )


def _prove(database: Database, index: int, size: int) -> Sequence[bytes]:
    with database.read() as session:
        return audit_tree.prove(session, lambda node: inclusion_proof(node, index, size))


def audit_appends(lab: Laboratory) -> Iterator[Figure]:
    """Durable audit entries from many threads: they share commits instead of waiting in line."""
    count = lab.times(4000, 1000)
    for backend in Backend:
        with lab.database(backend) as database:
            alone = _append(database, 1, count // 8)
            together = _append(database, 16, count)
            yield Figure(
                f"audit entries, {backend}, 16 threads",
                str(together),
                f"1 thread: {alone}",
                f"{together.rate / alone.rate:.1f} x",
                "more than one thread's",
                together.rate > alone.rate,
            )


def _append(database: Database, threads: int, count: int) -> Latencies:
    event = Event("bench.measured", "bench:1", details={"number": 1})

    def work(session: Session) -> None:
        audit.record(session, SYSTEM, event, utc_now())

    def append(_number: int) -> float:
        started = time.perf_counter()
        database.write(work)
        return time.perf_counter() - started

    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        seconds = list(pool.map(append, range(count)))
        return Latencies(seconds, time.perf_counter() - begun)
