"""Routes: audience and kind of every method, known before a call is read."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from qflare_server.use_cases.access.roles import ACCESS, Role

HEALTH_SERVICE: Final = "/grpc.health.v1.Health/"
REFLECTION_SERVICES: Final = "/grpc.reflection."
WATCHES: Final = frozenset({"/qflare.v1.AdminService/WatchTrainingSession"})
"""Long-lived streams with little data; they have separate slots, so that they do not block downloads."""


class Audience(Enum):
    """Audience of a method."""

    HEALTH = auto()
    """Anyone: probes and load balancers."""
    REFLECTION = auto()
    """Anyone: tools that use reflection."""
    ANYONE = auto()
    """Anyone: devices that enroll or log in."""
    CREDENTIAL = auto()
    """Callers with a token."""


@dataclass(frozen=True)
class Route:
    """A method; `kind` is its type in the usual gRPC metrics."""

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
        """Whether it is a method of the coordinator rather than of gRPC's own services."""
        return self.audience in {Audience.ANYONE, Audience.CREDENTIAL}

    @property
    def direction(self) -> str:
        """Return `watch` or `down` for a method with a response stream."""
        return "watch" if self.method in WATCHES else "down"


def audience_of(method: str) -> Audience:
    """Return the audience of a method; a method without a row in the table of roles requires a credential."""
    if method.startswith(HEALTH_SERVICE):
        return Audience.HEALTH
    if method.startswith(REFLECTION_SERVICES):
        return Audience.REFLECTION
    return Audience.ANYONE if Role.ANYONE in ACCESS.get(method, ()) else Audience.CREDENTIAL
