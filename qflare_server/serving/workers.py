"""Worker processes that share one port, and their supervisor."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qflare_server.config import LIFELINE_VARIABLE, WORKER_VARIABLE, ConfigError, ServerConfig

logger = logging.getLogger(__name__)


def supervise(config: ServerConfig) -> int:
    """Run the worker processes; if one exits, stop all, so that the service manager restarts the program.

    Returns:
        0 if all workers stopped on request, else 1.
    """
    workers: list[subprocess.Popen[bytes]] = []
    told: set[int] = set()  # a plain variable, because a signal handler must not take a lock
    is_told = False

    def forward(number: int, _frame: object) -> None:
        nonlocal is_told
        is_told = True
        for worker in workers:
            told.add(worker.pid)
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    with _shared_port(config.listen) as listen, _lifeline() as line:
        workers.extend(_start_worker(index, listen, line) for index in range(config.workers))
        if not is_told:
            # Not os.wait(), which would consume the exit code of a worker.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for worker in workers:
            if worker.pid not in told:  # a second signal would stop a draining worker immediately
                worker.send_signal(signal.SIGTERM)
        codes = [worker.wait() for worker in workers]
    as_told = is_told and all(code in {0, -signal.SIGTERM} for code in codes)
    if not as_told:
        logger.error("a worker exited: exit codes %s", " ".join(map(str, codes)))
    return 0 if as_told else 1


def _start_worker(index: int, listen: str, line: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qflare_server", *sys.argv[1:], "--listen", listen]
    variables = {WORKER_VARIABLE: str(index), LIFELINE_VARIABLE: str(line)}
    return subprocess.Popen(  # noqa: S603 - our own program and arguments
        command, env={**os.environ, **variables}, pass_fds=[line]
    )


@contextmanager
def _shared_port(listen: str) -> Iterator[str]:
    """Yield the common address of all workers, with port 0 replaced by one free port.

    The socket reserves the port until the workers listen on it. It does not listen itself, so it receives no
    connections.
    """
    host, _, port = listen.rpartition(":")
    address = host.strip("[]") or "127.0.0.1"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if port != "0":
        if port.isdecimal():
            _require_free(family, address, int(port))
        yield listen
        return
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address, 0))
        yield f"{host}:{held.getsockname()[1]}"


def _require_free(family: socket.AddressFamily, address: str, port: int) -> None:
    """Refuse a port on which another program listens: with SO_REUSEPORT it would receive a share of the calls.

    Raises:
        ConfigError: The address is in use, or cannot be bound.
    """
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigError(
                f"QFLARE_LISTEN: cannot bind {address}:{port}: {error.strerror}"
            ) from error


@contextmanager
def _lifeline() -> Iterator[int]:
    """Yield a file descriptor that reaches end-of-file when this process exits for any reason."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_supervisor(stopped: threading.Event) -> None:
    """Exit when the supervisor exits, so that a killed supervisor leaves no workers on the port."""
    line = os.environ.get(LIFELINE_VARIABLE)
    if line is None:
        return

    def watch() -> None:
        os.read(int(line), 1)
        stopped.set()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
