"""Health service: the states of the coordinator's services, for probes and load balancers that anyone may run.

The servicer of `grpcio-health-checking` sends to watchers under its lock and waits until each message is written.
gRPC's own thread takes that lock when a watch ends, and the wait for a caller that reads nothing has no end: either
stops the server. Here nothing waits under a lock. The contract is grpc/health/v1/health.proto.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse
Post = Callable[[health_pb2.HealthCheckResponse], None]
"""Sends a message without waiting for the caller."""


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the library has no types
    """States of services; thread-safe. No lock is held while anything waits for a caller or for gRPC."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[str, int] = {"": _Response.SERVING}
        self._watches: dict[Post, str] = {}

    @property
    def watch_count(self) -> int:
        """Number of watches."""
        return len(self._watches)

    def set(self, service: str, state: int) -> None:
        """Set the state of a service and send it to its watchers; the empty name is the coordinator as a whole."""
        with self._lock:
            if self._states.get(service) == state:
                return
            self._states[service] = state
            for post, watched in self._watches.items():
                if watched == service:
                    post(_Response(status=state))

    def Check(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the state of a service; NOT_FOUND if there is none of this name."""
        state = self._states.get(request.service)
        if state is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return _Response()
        return _Response(status=state)

    def List(  # noqa: N802 - the contract's name
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> health_pb2.HealthListResponse:
        """Return the state of every service."""
        with self._lock:
            states = dict(self._states)
        statuses = {name: _Response(status=state) for name, state in states.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    def Watch(  # noqa: N802 - the contract's name
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext, post: Post
    ) -> None:
        """Send the state of a service, and each later one, until the caller cancels."""
        with self._lock:
            state = self._states.get(request.service, _Response.SERVICE_UNKNOWN)
            self._watches[post] = request.service
            post(_Response(status=state))
        if not context.add_callback(partial(self._forget, post)):
            self._forget(post)

    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]  # returns at once, sends later

    def _forget(self, post: Post) -> None:
        with self._lock:
            self._watches.pop(post, None)
