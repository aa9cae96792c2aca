"""`serve`: runs a coordinator."""

import argparse
import ctypes
import gc
import logging
import os
import signal
import threading
from typing import Any

from qflare.command_line import on_signals, whole
from qflare.terminal import say
from qflare_server.cli.keys import ensure_initialized
from qflare_server.config import WORKER_VARIABLE, ServerConfig
from qflare_server.serving.coordinator import Coordinator
from qflare_server.serving.rpc.limits import raise_file_limit
from qflare_server.serving.workers import end_with_supervisor, supervise

logger = logging.getLogger(__name__)

STOP_SLACK_S = 10.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def add(commands: Any) -> None:
    """Add this module's parsers."""
    serve = commands.add_parser(
        "serve",
        help="run a coordinator",
        description="Run a coordinator until SIGTERM or SIGINT.",
        epilog="example: qflare-server --data-dir qflare-data serve --listen 127.0.0.1:50051",
    )
    serve.add_argument(
        "--listen", help="address, such as 127.0.0.1:50051; port 0 selects a free port"
    )
    serve.add_argument("--workers", type=whole(1, 64), help="processes that share the port")
    serve.add_argument(
        "--dashboard", help="address of the dashboard, such as 127.0.0.1:8080; default: none"
    )
    serve.set_defaults(run=run_serve)


def run_serve(config: ServerConfig, _arguments: argparse.Namespace) -> int:
    """Serve until a signal; with several workers, start them and wait for them."""
    notes = ensure_initialized(config)
    if WORKER_VARIABLE not in os.environ:
        logger.info("settings: %s", config.as_log())
        if config.workers > 1:
            return supervise(config)
    _keep_freed_memory()
    raise_file_limit()
    coordinator = Coordinator(config)
    stopped = threading.Event()
    on_signals((signal.SIGTERM, signal.SIGINT), stopped.set)
    end_with_supervisor(stopped)
    coordinator.start()
    gc.collect()
    gc.freeze()  # exclude startup objects from garbage collection, which would delay calls
    _announce(coordinator, notes)
    stopped.wait()
    _bound_stop(config)
    coordinator.stop()
    return 0


def _bound_stop(config: ServerConfig) -> None:
    """End the process if shutdown exceeds the sum of its bounded waits."""
    limit_s = config.drain_s + 3 * config.database_timeout_s + STOP_SLACK_S

    def end() -> None:
        logger.error("stopping took longer than %.0f s; the process ends", limit_s)
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


def _keep_freed_memory() -> None:
    """Tune glibc's allocator to reuse freed chunks.

    By default it returns the memory of every 1 MiB message to the system, and maps and clears memory for the next one.
    Its per-thread arenas do not share freed memory, which costs another sixth.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_ARENA_MAX, 2)


def _announce(coordinator: Coordinator, notes: list[str]) -> None:
    """Print the listening addresses and, on first start, the file locations; never a secret."""
    for line in notes:
        say(line, flush=True)
    if coordinator.dashboard is not None:
        say(f"dashboard on {coordinator.dashboard.url}", flush=True)
    say(f"serving on {coordinator.address}", flush=True)
