"""The pool of processes that trains virtual devices: what becomes of it when they are interrupted or killed."""

import os
import re
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from qflare_simulation import SimulationError
from qflare_simulation.memory import HomeFolder
from qflare_simulation.pool import ProcessPool
from qflare_simulation.worker import Programs

RESULTS = 200
RESULT_BYTES = 2**20
"""More than a pipe holds: sending a result takes several writes."""
TICK_S = 0.002


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(
        train=None,
        evaluate=None,
        data=[],
        test=None,
        held_out=None,
        privacy=None,
        seed=0,
        realm="test",
        home=HomeFolder(tmp_path),
    )


@contextmanager
def interrupted_children() -> Iterator[set[int]]:
    """Interrupt new child processes all the time, from their first moment on, as Ctrl-C in a terminal does once."""
    ended, before = threading.Event(), set(psutil.Process().children(recursive=True))
    interrupted: set[int] = set()

    def interrupt() -> None:
        while not ended.wait(TICK_S):
            for child in set(psutil.Process().children(recursive=True)) - before:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGINT)
                interrupted.add(child.pid)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield interrupted
    finally:
        ended.set()
        thread.join()


def test_interrupted_processes_give_their_results(tmp_path: Path, programs: Programs) -> None:
    with interrupted_children() as interrupted, ProcessPool(programs, 2, tmp_path) as pool:
        results = [pool.submit(os.urandom, RESULT_BYTES) for _ in range(RESULTS)]

        assert [len(result()) for result in results] == [RESULT_BYTES] * RESULTS
    assert len(interrupted) >= pool.size


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_result() -> object:
    opened: Any = Path.open

    def die_amid(path: Path, mode: str = "r", **options: Any) -> None:
        with opened(path, mode, **options) as file:
            file.write(b"{")
        die()

    Path.open = die_amid  # type: ignore[assignment,method-assign]
    return bytes(RESULT_BYTES)


def cut_off(function: Callable[[], object]) -> object:
    """Call a function in a process that is killed amid the first message that may be cut by a kill."""
    connection: Any = Connection
    whole = connection._send

    def send(to: Any, data: bytes, *arguments: Any) -> None:
        if len(data) > select.PIPE_BUF:
            os.write(to.fileno(), bytes(data[: len(data) // 2]))
            die()
        whole(to, data, *arguments)

    connection._send = send
    return function()


def raise_long() -> None:
    raise LookupError("long" * RESULT_BYTES)


def raise_unserializable() -> None:
    raise LookupError(threading.Lock())


def raise_surrogates() -> None:
    raise LookupError("\ud800")


@pytest.mark.parametrize("function", [die, half_a_result], ids=["at work", "amid a result"])
def test_a_killed_process_ends_the_work_of_the_pool(
    tmp_path: Path, programs: Programs, function: Callable[[], object]
) -> None:
    with ProcessPool(programs, 2, tmp_path) as pool:
        other = pool.submit(signal.pause)
        killed = pool.submit(function)

        for result in (killed, other):
            with pytest.raises(SimulationError, match=r"killed, probably for want of memory"):
                result()
        with pytest.raises(SimulationError, match=r"killed, probably for want of memory"):
            pool.submit(os.urandom, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (partial(os.urandom, RESULT_BYTES), None),
        (raise_long, "LookupError: long"),
        (threading.Lock, "TypeError: a process of the pool cannot return lock"),
        (raise_unserializable, "LookupError: <unlocked _thread.lock"),
        (raise_surrogates, "LookupError: \ud800"),
    ],
    ids=["result", "error", "another result", "error with an object", "error with odd text"],
)
def test_no_message_of_a_process_can_be_cut_by_a_kill(
    tmp_path: Path,
    programs: Programs,
    function: Callable[[], object],
    found: str | None,
) -> None:
    with ProcessPool(programs, 1, tmp_path) as pool:
        result = pool.submit(cut_off, function)

        if found is None:
            assert len(result()) == RESULT_BYTES
        else:
            with pytest.raises(SimulationError, match=found):
                result()
    assert list(tmp_path.iterdir()) == []


def test_an_error_tells_where_in_the_process_it_was_raised(
    tmp_path: Path, programs: Programs
) -> None:
    with ProcessPool(programs, 1, tmp_path) as pool:
        result = pool.submit(raise_long)

        with pytest.raises(SimulationError, match="LookupError") as failure:
            result()

    assert re.search("in raise_long", str(failure.value.__cause__))


def test_a_result_that_nobody_waits_for_leaves_no_file(tmp_path: Path, programs: Programs) -> None:
    with ProcessPool(programs, 1, tmp_path) as pool:
        pool.submit(os.urandom, RESULT_BYTES)
        pool.submit(os.urandom, 1)()

        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
