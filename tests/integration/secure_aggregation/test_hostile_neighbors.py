"""A member of a group that signs and sends anything, at every step: it is refused, and the others go on."""

from collections.abc import Callable
from random import Random
from typing import Any, Final

import numpy as np
import pytest

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import MAX_MESSAGE_BYTES, SigningContext
from qflare.v1 import coordinator_service_pb2 as calls
from qflare.v1 import security_pb2
from qflare_client import Client
from qflare_client.errors import RejectedError
from tests.integration.conftest import Deployment
from tests.integration.secure_aggregation.conftest import WEIGHTS, wait_for_version
from tests.integration.secure_aggregation.test_neighbors import (
    expire,
    expire_groups,
    finish,
    mean_of,
    session_of,
    take_step,
    train,
    until,
)
from tests.support.hostile_requests import RequestMaker

COUNT: Final = 60
STATEMENTS: Final[dict[str, tuple[type[Any], SigningContext]]] = {
    "advertisement": (
        security_pb2.NeighborAdvertisement,
        SigningContext.NEIGHBOR_ADVERTISEMENT,
    ),
    "shares": (security_pb2.NeighborShares, SigningContext.NEIGHBOR_SHARES),
    "confirmation": (security_pb2.NeighborConfirmation, SigningContext.NEIGHBOR_CONFIRMATION),
    "reveal": (security_pb2.NeighborReveal, SigningContext.NEIGHBOR_REVEAL),
}
FLAGS: Final = {
    "advertisement": "",
    "shares": "has_shares",
    "confirmation": "has_confirmed",
    "reveal": "has_revealed",
}
STAGES: Final = {"shares": "share", "confirmation": "confirm", "reveal": "reveal"}

REFUSALS: Final = {
    "",
    "AuthenticationError",
    "DuplicateUpdateError",
    "InvalidRequestError",
    "NotFoundError",
    "NotSelectedError",
    "PermissionDeniedError",
    "RoundNotOpenError",
}


class HostileCalls:
    """The calls of a device, which sends spoiled steps instead of one step.

    Args:
        client: The device.
        step: Its step.
    """

    def __init__(self, client: Client, step: str) -> None:
        self.calls = client._calls
        self._key = client._login.identity.keys.signing
        self._step = step
        self._random = Random(step)
        self.outcomes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.calls, name)

    def unary(self, stub: Any, request: Any, **settings: Any) -> Any:
        """Send many spoiled steps, and not the right one."""
        if request.WhichOneof("step") != self._step:
            return self.calls.unary(stub, request, **settings)
        for _ in range(COUNT):
            spoiled = self._spoiled(request)
            try:
                self.calls.unary(stub, spoiled, **settings)
            except RejectedError as error:
                self.outcomes.append(type(error).__name__)
            else:
                self.outcomes.append("")
                break
        return calls.SecureAggregationStepResponse()

    def _spoiled(self, request: Any) -> Any:
        """Return a step with another statement, other shares, or both; signed by the device, or not."""
        made, maker = type(request)(), RequestMaker(self._random, {})
        made.CopyFrom(request)
        part = getattr(made, self._step)
        envelope = part.statement if self._step == "shares" else part
        if self._step == "shares" and self._random.random() < 0.4:
            maker.spoil(self._random.choice(part.boxes))
            return made
        kind, context = STATEMENTS[self._step]
        statement = kind.FromString(envelope.payload)
        maker.spoil(statement)
        payload = statement.SerializeToString(deterministic=True)
        if self._random.random() < 0.2:
            payload = maker.spoil_bytes(payload)
        if self._random.random() < 0.2 or not 0 < len(payload) <= MAX_MESSAGE_BYTES:
            envelope.payload = payload
        else:
            envelope.CopyFrom(sign_envelope(self._key, context, payload))
        return made


@pytest.mark.parametrize("step", STATEMENTS)
def test_a_member_that_sends_anything_is_refused(
    deploy: Callable[..., Deployment], step: str
) -> None:
    """What is accepted is valid; the device cannot go on with it. If nothing is, it can still take the step."""
    made = deploy(worker_poll_s=0.02, max_calls_per_second=1_000_000)
    clients = [made.device(f"device-{index}") for index in range(6)]
    session_id = session_of(made, 6, 4)
    hostile = HostileCalls(clients[0], step)
    changes: dict[int, Any] = {}
    for name, flag in FLAGS.items():
        if name == "confirmation":
            for index, client in enumerate(clients, 6 - len(clients)):
                train(client, session_id, index, changes)
            expire(made, session_id)
        if name == step:
            clients[0]._neighbors._calls = hostile  # type: ignore[assignment]
            until(clients[0], session_id, lambda _task: bool(hostile.outcomes))
            clients[0]._neighbors._calls = hostile.calls
            if "" in hostile.outcomes:
                clients = clients[1:]
        take_step(made, session_id, clients, flag)
        if len(clients) < 6 and name != "advertisement":
            expire_groups(made, session_id, STAGES[name])
    finish(made, session_id, clients)
    model = wait_for_version(clients[1], session_id, 1)
    got = model.arrays["w"].astype(float) - WEIGHTS["w"]
    assert np.abs(got - mean_of(changes, "w")).max() < 1e-5
    assert set(hostile.outcomes) <= REFUSALS
