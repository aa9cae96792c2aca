"""A coordinator that lies to devices: a proxy that alters signed tasks, and signs them anew with the task key."""

from collections.abc import Callable
from typing import Any, Final

from qflare.v1 import coordinator_service_pb2, security_pb2
from tests.support.newer_coordinator import NewerCoordinator

_REPEATED: Final = ("round_number", "base_version", "base_digest")
"""An answer repeats these fields of its signed statement too."""

Lie = Callable[[security_pb2.TaskStatement], object]
Sign = Callable[[Any, bytes], security_pb2.SignedEnvelope]


class LyingCoordinator(NewerCoordinator):
    """Forwards every call; alters the tasks of devices.

    Args:
        address: The real coordinator.
        sign: Signs with a key of the coordinator, by role.
    """

    def __init__(self, address: str, sign: Sign) -> None:
        self.lie: Lie = lambda _: None
        self.signs = True
        self._sign = sign
        super().__init__(address, ())

    def _changed(self, method: Any, data: bytes) -> bytes:
        if method.name != "GetTask":
            return data
        answer = coordinator_service_pb2.GetTaskResponse.FromString(data)
        task = security_pb2.TaskStatement.FromString(answer.task.payload)
        self.lie(task)
        payload = task.SerializeToString(deterministic=True)
        answer.transfer.CopyFrom(task.transfer)
        for name in _REPEATED:
            setattr(answer, name, getattr(task, name))
        if self.signs:
            answer.task.CopyFrom(self._sign(security_pb2.KEY_ROLE_TASK, payload))
        else:
            answer.task.payload = payload
        return answer.SerializeToString()
