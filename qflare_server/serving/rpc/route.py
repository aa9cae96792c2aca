"""Routes: audience and shape of every method, known before a call is read."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from qflare_server.use_cases.access.roles import ACCESS, Role

HEALTH_SERVICE: Final = "/grpc.health.v1.Health/"
REFLECTION_SERVICES: Final = "/grpc.reflection."
WATCHES: Final = frozenset({"/qflare.v1.AdminService/WatchTrainingSession"})
"""Streams that last long and send little: they have places of their own, so that they keep none from a download."""


class Audience(Enum):
    """Who may call a method."""

    HEALTH = auto()
    """Anybody: probes and load balancers."""
    REFLECTION = auto()
    """Anybody: tools that ask which methods there are."""
    ANYONE = auto()
    """Anybody: a device that enrolls or logs in."""
    CREDENTIAL = auto()
    """Callers with a token."""


@dataclass(frozen=True)
class Route:
    """A method: `kind` is what the well-known metrics call its shape."""

    method: str
    audience: Audience
    request_streaming: bool
    response_streaming: bool

    @property
    def kind(self) -> str:
        """Return unary, client_stream, server_stream or bidi_stream."""
        if self.request_streaming:
            return "bidi_stream" if self.response_streaming else "client_stream"
        return "server_stream" if self.response_streaming else "unary"

    @property
    def is_ours(self) -> bool:
        """Whether it is a method of the coordinator, not of gRPC's own services."""
        return self.audience in {Audience.ANYONE, Audience.CREDENTIAL}

    @property
    def direction(self) -> str:
        """Return watch or down for what streams its answer."""
        return "watch" if self.method in WATCHES else "down"


def audience_of(method: str) -> Audience:
    """Return who may call a method; a method without a row in the table of roles needs a credential."""
    if method.startswith(HEALTH_SERVICE):
        return Audience.HEALTH
    if method.startswith(REFLECTION_SERVICES):
        return Audience.REFLECTION
    return Audience.ANYONE if Role.ANYONE in ACCESS.get(method, ()) else Audience.CREDENTIAL
