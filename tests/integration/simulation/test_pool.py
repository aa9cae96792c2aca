"""The pool of processes that trains virtual devices: what becomes of it when its processes are interrupted."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from qflare_simulation.memory import HomeFolder
from qflare_simulation.pool import ProcessPool
from qflare_simulation.worker import Programs

RESULTS = 200
RESULT_BYTES = 2**20
"""More than a pipe holds: sending a result takes several writes."""
TICK_S = 0.002


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


def test_interrupted_processes_give_their_results(tmp_path: Path) -> None:
    programs = Programs(
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
    with interrupted_children() as interrupted, ProcessPool(programs, 2) as pool:
        results = [pool.submit(os.urandom, RESULT_BYTES) for _ in range(RESULTS)]

        assert [len(result()) for result in results] == [RESULT_BYTES] * RESULTS
    assert len(interrupted) >= pool.size
