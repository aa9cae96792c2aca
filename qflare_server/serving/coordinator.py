"""One coordinator process: built from a configuration, started, drained, stopped."""

import hashlib
import logging
import os
import socket
import threading
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

import qflare
from qflare.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    coordinator_service_pb2,
    coordinator_service_pb2_grpc,
)
from qflare_server.aggregation.aggregator import Aggregator
from qflare_server.aggregation.slice_worker import SliceWorkerThread
from qflare_server.aggregation.worker import AggregationWorker
from qflare_server.config import UNIX_SOCKETS, WORKER_VARIABLE, ServerConfig
from qflare_server.context import Clock, Telemetry
from qflare_server.serving.application import Application
from qflare_server.serving.dashboard import open_dashboard
from qflare_server.serving.listeners import HealthListener, bind
from qflare_server.serving.maintenance import Maintenance
from qflare_server.serving.observability import Observability
from qflare_server.serving.rpc.admin_service import AdminServicer
from qflare_server.serving.rpc.coordinator_service import CoordinatorServicer
from qflare_server.serving.rpc.dispatcher import Dispatcher
from qflare_server.serving.rpc.health import HealthService
from qflare_server.serving.rpc.idle_polls import IdlePolls
from qflare_server.serving.rpc.interceptor import CallInterceptor
from qflare_server.serving.rpc.limits import StreamLimits, Watchdog, channel_options
from qflare_server.serving.rpc.object_access import ObjectAccessInterceptor
from qflare_server.serving.rpc.possession import PossessionInterceptor
from qflare_server.serving.rpc.reflection import MethodPool
from qflare_server.serving.rpc.small_updates import SmallUpdates
from qflare_server.serving.rpc.validation import RequestValidation
from qflare_server.serving.tls import tls_credentials
from qflare_server.serving.webhooks import WebhookThreads
from qflare_server.use_cases.audit.sequencer import AuditSequencer

logger = logging.getLogger(__name__)

MAX_REPLICA_NAME: Final = 64
KEYSET: Final = "keyset"
"""Service of the health service that is NOT_SERVING from 60 days before the keyset expires; the others go on."""
SERVICES: Final = (
    coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name,
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"


class Coordinator:
    """One coordinator process.

    Args:
        config: The settings.
        clock: Returns the time; None means the database's clock.
        telemetry: Telemetry sink, in addition to the configured metrics and traces.

    Raises:
        SchemaError: The database schema does not match this program.
        KeyStoreError: The keys are missing or cannot be decrypted.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Clock | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.config = config
        self.draining = threading.Event()
        self.observability = Observability(config, telemetry)
        self.parts = Application.open(config, clock, self.observability.telemetry)
        self.use_cases = self.parts.use_cases
        self._watchdog = Watchdog(config.stall_timeout_s)
        self._health = HealthService()
        limits, telemetry = StreamLimits(config), self.parts.context.telemetry
        self._boundary = CallInterceptor(
            config, self.use_cases.authentication, limits, self._watchdog, self.draining, telemetry
        )
        polls = IdlePolls(self.parts.context, self.use_cases, self._boundary)
        small = SmallUpdates(self.parts.context, self.use_cases, self._boundary)
        self._dispatcher = Dispatcher(
            config, self._boundary, limits, telemetry, polls.answer, small
        )
        self._server = self._build()
        self.port = self._bind()
        self.health_listener = (
            HealthListener(config, self._health, self._dispatcher, self._boundary)
            if config.health_listen
            else None
        )
        holder = replica_name(socket.gethostname(), self.port, os.environ.get(WORKER_VARIABLE, "0"))
        context = self.parts.context
        aggregator = Aggregator(context, self.parts.executor, holder)
        self._worker = AggregationWorker(aggregator, context, self.parts.wake)
        self._slice_worker = SliceWorkerThread(context, self.parts.executor, holder)
        self._webhooks = WebhookThreads(context, holder)
        self._housekeeping = Maintenance(
            context,
            self.use_cases,
            AuditSequencer(context),
            holder,
            self._listening,
            self._set_healthy,
        )
        self.dashboard = open_dashboard(config, self.use_cases, self.draining)

    def _build(self) -> grpc.Server:
        interceptors: list[grpc.ServerInterceptor] = [self._boundary]
        if self.config.require_pop:
            interceptors.append(PossessionInterceptor(self.use_cases.login))
        interceptors.append(RequestValidation())
        interceptors.append(ObjectAccessInterceptor(self.use_cases.objects))
        server = grpc.server(
            self._dispatcher,  # type: ignore[arg-type]  # gRPC calls its `submit`, no more
            interceptors=interceptors,
            options=list(channel_options(self.config).items()),
        )
        coordinator_service_pb2_grpc.add_CoordinatorServiceServicer_to_server(
            CoordinatorServicer(self.use_cases), server
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(self.use_cases), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.config.reflection:
            _add_reflection(server)
        return server

    def _bind(self) -> int:
        has_tls = self.config.tls_certificate_file is not None
        credentials = tls_credentials(self.config) if has_tls else None
        return bind(self._server, "QFLARE_LISTEN", self.config.listen, credentials)

    @property
    def _listening(self) -> str:
        """The configured address, with the actual port if the setting is 0."""
        host, _, port = self.config.listen.rpartition(":")
        return f"{host}:{self.port}" if port == "0" else self.config.listen

    @property
    def address(self) -> str:
        """Address for clients on this machine."""
        if self.config.listen.startswith(UNIX_SOCKETS):
            return self.config.listen
        host, _, _ = self.config.listen.rpartition(":")
        return f"{'localhost' if host in {'0.0.0.0', '[::]'} else host}:{self.port}"  # noqa: S104

    def start(self) -> None:
        """Serve.

        Raises:
            PayloadStoreConflictError: Another coordinator on the database stores new payloads elsewhere.
            PayloadPlaceTakenError: The folder or bucket of payloads belongs to another copy of this database.
        """
        self._housekeeping.join()
        self.observability.start(self.parts.context)
        self._webhooks.start()
        self._server.start()
        self._worker.start()
        self._slice_worker.start()
        self._housekeeping.start()
        if self.dashboard is not None:
            self.dashboard.start()
        if self.health_listener is not None:
            self.health_listener.start()
        self._set_healthy(healthy=True)
        logger.info("serving: address=%s version=%s", self.address, qflare.__version__)

    def _set_healthy(self, *, healthy: bool) -> None:
        serving = healthy and not self.draining.is_set()
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *SERVICES, "liveness", "readiness"):
            self._health.set(name, state)
        soon = self.parts.keys.status().expires_soon(self.parts.context.clock())
        self._health.set(KEYSET, health_pb2.HealthCheckResponse.NOT_SERVING if soon else state)

    def stop(self, grace_s: float | None = None) -> None:
        """Drain and close: refuse new work, wait for running calls, and finish the current aggregation pass.

        Connections receive GOAWAY immediately, so that devices find another replica. Watches of the health service,
        which never end by themselves, do not delay the drain.
        """
        grace = self.config.drain_s if grace_s is None else grace_s
        self.draining.set()
        self._set_healthy(healthy=False)
        self.use_cases.watching.close()
        self._server.stop(grace)
        self._boundary.running.wait_until_none(grace)
        self._server.stop(None).wait()
        self._webhooks.stop()
        self._slice_worker.stop(grace + 10.0)
        self._worker.stop(grace + 10.0)
        self._housekeeping.stop()
        self._watchdog.stop()
        self._dispatcher.shutdown()
        if self.dashboard is not None:
            self.dashboard.stop()
        if self.health_listener is not None:
            self.health_listener.stop()
        self.observability.close()
        self.parts.close()
        logger.info("stopped")


def replica_name(host: str, port: int, worker: str) -> str:
    """Return the name of this process among its replicas, the same after a restart, at most 64 ASCII characters.

    A long host name is cut and its digest added: processes of one host must not share a name.
    """
    name = ascii(f"{host}:{port}:{worker}")[1:-1]
    if len(name) <= MAX_REPLICA_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: MAX_REPLICA_NAME - 17]}-{digest}"


def _add_reflection(server: grpc.Server) -> None:
    """Serve reflection as v1 and v1alpha: grpcurl asks for v1 first, the library supports only v1alpha."""
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    pool: Any = MethodPool(descriptor_pool.Default())
    reflection.enable_server_reflection(names, server, pool)
    servicer = reflection.ReflectionServicer(names, pool)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )
