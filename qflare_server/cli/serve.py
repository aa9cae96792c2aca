"""`serve`, `migrate`, `health`."""

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qflare_server.cli.certificates import server_name
from qflare_server.cli.keys import ensure_initialised
from qflare_server.config import WORKER_VARIABLE, ServerConfig
from qflare_server.serving.coordinator import Coordinator
from qflare_server.serving.workers import end_with_supervisor, supervise
from qflare_server.storage.engine import make_engine
from qflare_server.storage.schema import current_revision, upgrade

logger = logging.getLogger(__name__)

STOP_SLACK_S = 10.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def add(commands: Any) -> None:
    """Add the parsers of this topic."""
    serve = commands.add_parser(
        "serve",
        help="run a coordinator",
        description="Run a coordinator until SIGTERM or SIGINT.",
        epilog="example: qflare-server serve --listen 127.0.0.1:50051 --data-dir qflare-data",
    )
    serve.add_argument("--listen", help="address, such as 127.0.0.1:50051; port 0 takes a free one")
    serve.add_argument("--workers", type=int, help="processes that share the port")
    serve.add_argument(
        "--dashboard", help="address of the web pages, such as 127.0.0.1:8080; without it none"
    )
    serve.set_defaults(run=run_serve)
    migrate = commands.add_parser(
        "migrate",
        help="bring the database to this program's schema",
        epilog="example: QFLARE_DATABASE_URL=postgresql://... qflare-server migrate",
    )
    migrate.set_defaults(run=run_migrate)
    health = commands.add_parser(
        "health",
        help="ask a coordinator whether it serves; exit code 0 if so",
        epilog="example: qflare-server health --address 127.0.0.1:50051",
    )
    health.add_argument("--address", help="default: the listening address")
    health.add_argument("--service", default="", help="service name; empty asks for the whole")
    health.add_argument(
        "--ca",
        type=Path,
        help="PEM file of certificate authorities; without it an --address is asked without TLS,"
        " and the listening address as the settings say",
    )
    health.add_argument("--certificate", type=Path, help="PEM chain of a client, for mutual TLS")
    health.add_argument("--key", type=Path, help="PEM key of that certificate")
    health.add_argument("--timeout", type=float, default=5.0, help="seconds")
    health.set_defaults(run=run_health)


def run_serve(config: ServerConfig, _arguments: argparse.Namespace) -> int:
    """Serve until a signal; with several workers, start them and wait for them."""
    notes = ensure_initialised(config)
    if WORKER_VARIABLE not in os.environ:
        logger.info("settings: %s", config.as_log())
        if config.workers > 1:
            return supervise(config)
    _keep_freed_memory()
    coordinator = Coordinator(config)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_at_once() if stopped.is_set() else stopped.set())
    end_with_supervisor(stopped)
    coordinator.start()
    gc.collect()
    gc.freeze()  # what is there by now stays: a collection need not go through it while calls wait
    _announce(coordinator, notes)
    stopped.wait()
    _bound_stop(config)
    coordinator.stop()
    return 0


def _end_at_once() -> None:
    """End on a second signal, whatever is under way: what was acknowledged is durable."""
    os.write(sys.stderr.fileno(), b"qflare-server: ended at once by a second signal\n")
    os._exit(1)


def _bound_stop(config: ServerConfig) -> None:
    """End the process if stopping takes longer than it can when every wait is bounded."""
    limit_s = config.drain_s + 3 * config.database_timeout_s + STOP_SLACK_S

    def end() -> None:
        logger.error("stopping took longer than %.0f s; the process ends", limit_s)
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


def _keep_freed_memory() -> None:
    """Have the allocator keep chunks that are freed for the next ones, where it is glibc's.

    It would give every message of 1 MiB back to the system, and fetch and clear it anew for the next. With an arena
    for every few threads, as is its habit, what one has freed would not serve another: a sixth more memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_ARENA_MAX, 2)


def _announce(coordinator: Coordinator, notes: list[str]) -> None:
    """Say where it serves, and on the first start where its files are; no secret among it."""
    for line in notes:
        print(line, flush=True)
    if coordinator.dashboard is not None:
        print(f"dashboard on {coordinator.dashboard.url}", flush=True)
    print(f"serving on {coordinator.address}", flush=True)


def run_migrate(config: ServerConfig, _arguments: argparse.Namespace) -> int:
    """Migrate the database."""
    engine = make_engine(config)
    before = current_revision(engine)
    upgrade(engine)
    print(f"schema: {before or 'none'} -> {current_revision(engine)}")
    engine.dispose()
    return 0


def run_health(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Ask the health service."""
    channel = _health_channel(config, arguments)
    with channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=arguments.service)
        try:
            answer = stub.Check(request, timeout=arguments.timeout)
        except grpc.RpcError as error:
            print(f"not serving: {error.code().name}", file=sys.stderr)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(name)
    return 0 if name == "SERVING" else 1


def _health_channel(config: ServerConfig, arguments: argparse.Namespace) -> grpc.Channel:
    """Connect to an address, or to the coordinator of these settings: over TLS where that speaks TLS."""
    address = arguments.address or config.listen
    authorities, options = arguments.ca and arguments.ca.read_bytes(), []
    if authorities is None and not arguments.address and config.tls_certificate_file is not None:
        # Its own certificate is all that it may show: whoever holds the port must have the key to that.
        authorities = config.tls_certificate_file.read_bytes()
        options = [("grpc.ssl_target_name_override", server_name(authorities))]
    if authorities is None:
        return grpc.insecure_channel(address)
    key = arguments.key and arguments.key.read_bytes()
    chain = arguments.certificate and arguments.certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(authorities, key, chain)
    return grpc.secure_channel(address, credentials, options=options)
