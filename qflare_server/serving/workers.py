"""Worker processes that share one port, and the supervisor that starts and stops them."""

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
    """Run the worker processes; if one ends, end all, so that whoever supervises us starts again.

    Returns:
        0 if all ended as they were told to, else 1.
    """
    workers: list[subprocess.Popen[bytes]] = []
    told: set[int] = set()  # plain, since a handler must take no lock
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
            # Not os.wait(), which would take the exit code away from the worker that it belongs to.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for worker in workers:
            if worker.pid not in told:  # a second signal would end one that drains at once
                worker.send_signal(signal.SIGTERM)
        codes = [worker.wait() for worker in workers]
    as_told = is_told and all(code in {0, -signal.SIGTERM} for code in codes)
    if not as_told:
        logger.error("a worker ended: exit codes %s", " ".join(map(str, codes)))
    return 0 if as_told else 1


def _start_worker(index: int, listen: str, line: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qflare_server", *sys.argv[1:], "--listen", listen]
    variables = {WORKER_VARIABLE: str(index), LIFELINE_VARIABLE: str(line)}
    return subprocess.Popen(  # noqa: S603 - our own program and arguments
        command, env={**os.environ, **variables}, pass_fds=[line]
    )


@contextmanager
def _shared_port(listen: str) -> Iterator[str]:
    """Give the address that all workers listen at: port 0 is made the same free port for all.

    The socket holds the port until the workers have it; connections go to sockets that listen, which it does not.
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
    """Refuse a port that another program listens at: with SO_REUSEPORT it would get a share of the calls in silence.

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
    """Give a descriptor that reads as ended once this process is gone, however that comes about."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_supervisor(stopped: threading.Event) -> None:
    """End when the process that started the workers does: a killed one must not leave them on the port."""
    line = os.environ.get(LIFELINE_VARIABLE)
    if line is None:
        return

    def watch() -> None:
        os.read(int(line), 1)
        stopped.set()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
