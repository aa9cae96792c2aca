"""Where virtual devices train: what the engine needs, and a pool of processes of this machine."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol, Self

from loky import ProcessPoolExecutor
from loky.process_executor import TerminatedWorkerError

from qflare.processors import usable_processor_count
from qflare_simulation import worker
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

    The processes do not take Ctrl-C, which a terminal sends to all of them: this one ends them. A process that ended
    amid a result would leave half a message, whose other half the pool awaits for ever.

    Args:
        programs: What the devices run. It may hold functions of a notebook.
        workers: Number of processes; 0 means one for each processor, -1 none.
    """

    def __init__(self, programs: Programs, workers: int) -> None:
        self.size = workers or usable_processor_count()
        self._executor = None
        if workers < 0:
            self.size = 1
            worker.start(programs)
        else:
            self._executor = ProcessPoolExecutor(
                self.size, initializer=_start, initargs=(programs,)
            )
            resource_tracker.ensure_running()  # its start would unblock interruptions
            with _interruptions_blocked():  # which the processes inherit
                for _ in range(self.size):
                    self._executor.submit(worker.is_ready)

    def submit(
        self, function: Callable[..., Any], *arguments: Any, devices: Sequence[int] = ()
    ) -> Callable[[], Any]:
        """Start a function; return what waits for its result and returns it. Files of devices stay where they are."""
        del devices
        if self._executor is None:
            return _Later(function, arguments)
        future: Future[Any] = self._executor.submit(function, *arguments)

        def result() -> Any:
            try:
                return future.result()
            except TerminatedWorkerError as error:
                raise SimulationError(
                    "a process of the pool died, probably for want of memory: "
                    "use fewer simulation.workers"
                ) from error

        return result

    def __enter__(self) -> Self:
        """Return this pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; work that was not waited for is abandoned."""
        if self._executor is None:
            worker.close()
        else:
            self._executor.shutdown(wait=True, kill_workers=True)


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
