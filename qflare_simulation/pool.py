"""Where virtual devices train: what the engine needs, and a pool of processes of this machine.

Results come back in files. All processes of the pool write to one pipe, and this one reads whole messages from it: of a
process that is killed amid a long message, it would await the rest for ever. What travels through the pipe is shorter
than `PIPE_BUF` bytes, which are written at once or not at all (POSIX, write()).
"""

import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, Self

from loky import ProcessPoolExecutor
from loky.process_executor import TerminatedWorkerError

from qflare.processors import usable_processor_count
from qflare_simulation import results, worker
from qflare_simulation.errors import SimulationError
from qflare_simulation.worker import Programs


class Pool(Protocol):
    """Runs functions of `worker` in parallel.

    Attributes:
        size: How many at once.
    """

    size: int

    def submit(
        self, function: Callable[..., Any], *arguments: Any, devices: Sequence[int] = ()
    ) -> Callable[[], Any]:
        """Start a function; return what waits for its result and returns it.

        Args:
            function: Of `worker`.
            *arguments: Its arguments.
            devices: Whose kept files it reads or writes, by index.
        """


class ProcessPool:
    """Runs functions of `worker` in processes, or in this one; a context manager.

    The processes do not take Ctrl-C, which a terminal sends to all of them: this one ends them. When a process is
    killed, the work of all of them is lost.

    Args:
        programs: What the devices run. It may hold functions of a notebook.
        workers: Number of processes; 0 means one for each processor, -1 none.
        folder: An existing folder, where results are until they are read.
    """

    def __init__(self, programs: Programs, workers: int, folder: Path) -> None:
        self.size = workers or usable_processor_count()
        self._executor = None
        self._numbers = count()
        if workers < 0:
            self.size = 1
            worker.start(programs)
            return
        self._results = tempfile.TemporaryDirectory(
            prefix="results-", dir=folder, ignore_cleanup_errors=True
        )
        self._executor = ProcessPoolExecutor(self.size, initializer=_start, initargs=(programs,))
        resource_tracker.ensure_running()  # its start would unblock interruptions
        with _interruptions_blocked():  # which the processes inherit
            for _ in range(self.size):
                self._executor.submit(worker.is_ready)

    def submit(
        self, function: Callable[..., Any], *arguments: Any, devices: Sequence[int] = ()
    ) -> Callable[[], Any]:
        """Start a function; return what waits for its result and returns it. Files of devices stay where they are.

        Raises:
            SimulationError: Now or when the result is asked for: a process of the pool was killed; or when the result
                is asked for, the function raised in a process.
        """
        del devices
        if self._executor is None:
            return _Later(function, arguments)
        path = Path(self._results.name, str(next(self._numbers)))
        with _deaths_explained():
            future: Future[Any] = self._executor.submit(_outcome, path, function, arguments)

        def result() -> Any:
            with _deaths_explained():
                found = future.result()
            if isinstance(found, results.Raised):
                raise SimulationError(found.message) from _ProcessError(found.text)
            return found

        return result

    def __enter__(self) -> Self:
        """Return this pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; work that was not waited for is abandoned."""
        if self._executor is None:
            worker.close()
            return
        self._executor.shutdown(wait=True, kill_workers=True)
        self._results.cleanup()


@contextmanager
def _deaths_explained() -> Iterator[None]:
    try:
        yield
    except TerminatedWorkerError as error:
        raise SimulationError(
            "a process of the pool was killed, probably for want of memory: use fewer simulation.workers"
        ) from error


class _ProcessError(Exception):
    """Where in a process of the pool an error was raised: the cause of the error that is raised here."""


class _Filed:
    """What is in a file while it travels, and arrives as itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[Path], Any], tuple[Path]]:
        return _take, (self._path,)


def _take(path: Path) -> results.Result:
    found = results.read(path)
    path.unlink()
    return found


def _outcome(path: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Filed:
    try:
        results.write(path, function(*arguments))
    except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
        path.unlink(missing_ok=True)
        results.write(path, results.Raised.of(error))
    return _Filed(path)


@contextmanager
def _interruptions_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(programs: Programs) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.start(programs)


class _Later:
    """A call in this process, made when its result is asked for."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments
        self._result: list[Any] = []

    def __call__(self) -> Any:
        if not self._result:
            function, arguments = self._call
            self._result.append(function(*arguments))
        return self._result[0]
