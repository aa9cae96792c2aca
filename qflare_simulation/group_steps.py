"""Steps of virtual devices in rounds with neighbors, before and after training.

A device takes a step as soon as its group waits for it, and a step takes no virtual time. The next stage begins when
all members have taken theirs, or when the time of the step is up. A device that drops out of a round does so at one of
its five steps, each as probable as the others, and is silent until the next round.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from qflare.v1 import coordinator_service_pb2 as messages
from qflare_server.errors import QflareError
from qflare_server.storage.records import Round
from qflare_server.storage.tables import GroupStage
from qflare_server.use_cases.training_sessions.tasks import ADVERTISE
from qflare_simulation import worker
from qflare_simulation.config import SimulationConfig
from qflare_simulation.coordinator import Groups, SimulatedCoordinator
from qflare_simulation.pool import Pool
from qflare_simulation.worker import Brief, Left

CHUNK: Final = 8
"""Devices per call."""
SHOWN_BYTES: Final = 2**20
"""What a device of a large group is shown at once, about."""
TRAIN: Final = GroupStage.TRAIN.value
STEPS: Final = (
    ADVERTISE,
    GroupStage.SHARE.value,
    TRAIN,
    GroupStage.CONFIRM.value,
    GroupStage.REVEAL.value,
)


def lost_at(config: SimulationConfig, device: int, round_number: int) -> str:
    """Return the step of a round at which a device drops out; empty if it does not."""
    draw = random.Random(f"{config.seed}:{device}:{round_number}:steps")  # noqa: S311 - repeatable on purpose
    return draw.choice(STEPS) if draw.random() < config.drop_out else ""


class GroupSteps:
    """Lets devices take their steps.

    Args:
        coordinator: With a training session that has been started.
        pool: Where devices compute.
        config: The configuration.
        on_lost: Called with a round number for each device that drops out.
        on_refused: Called with a round number and an error for each step that the coordinator refuses.
    """

    def __init__(
        self,
        coordinator: SimulatedCoordinator,
        pool: Pool,
        config: SimulationConfig,
        on_lost: Callable[[int], None],
        on_refused: Callable[[int, QflareError], None],
    ) -> None:
        self._coordinator = coordinator
        self._pool = pool
        self._config = config
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._round = 0
        self._silent: set[int] = set()
        self._training: set[int] = set()

    def begin(self, current: Round) -> None:
        """Let all devices be heard of again if a round is new."""
        if current.number != self._round:
            self._round = current.number
            self._silent.clear()
            self._training.clear()

    def advertise(self, current: Round, brief: Brief, devices: Sequence[int], count: int) -> bool:
        """Let devices advertise, in an order of their own in each round; return whether any has.

        Args:
            current: The round, without groups.
            brief: Its work.
            devices: Those that are asked, and have not advertised.
            count: Most that may.
        """
        order = [device for device in devices if device not in self._silent]
        random.Random(f"{self._config.seed}:{current.number}:order").shuffle(order)  # noqa: S311 - as above
        able = list[int]()
        for device in order:
            if len(able) >= count:
                break
            if self._is_there(device, ADVERTISE):
                able.append(device)
        return self._take(brief, able)

    def take(self, brief: Brief, groups: Groups) -> bool:
        """Let devices take the steps before and after training that their groups wait for; return whether any has.

        Args:
            brief: The work of the round.
            groups: As far as they are.
        """
        able = [
            device
            for device, stage in sorted(groups.awaited.items())
            if stage != TRAIN and device not in self._silent and self._is_there(device, stage)
        ]
        return self._take(brief, able)

    def trainers(self, groups: Groups) -> list[int]:
        """Return the devices from which their groups wait for an update, each once in a round."""
        awaited = {device for device, stage in groups.awaited.items() if stage == TRAIN}
        found = sorted(awaited - self._silent - self._training)
        self._training.update(found)
        return found

    def shown(self, device: int) -> bytes:
        """Return what the coordinator shows a device, serialized."""
        return self._coordinator.shown(device).SerializeToString()

    def _is_there(self, device: int, step: str) -> bool:
        """Return whether a device takes a step; count it as lost otherwise."""
        if lost_at(self._config, device, self._round) != step:
            return True
        self._lose(device)
        return False

    def _lose(self, device: int) -> None:
        self._silent.add(device)
        self._on_lost(self._round)

    def _take(self, brief: Brief, devices: Sequence[int]) -> bool:
        """Let devices compute what they send, a bounded number ahead of what is recorded."""
        pending = deque[tuple[Sequence[int], Callable[[], Sequence[bytes | Left]]]]()
        recorded = 0
        for start in range(0, len(devices), CHUNK):
            part = devices[start : start + CHUNK]
            shown = [(device, self.shown(device)) for device in part]
            pending.append((part, self._pool.submit(worker.take_steps, brief, shown, devices=part)))
            if len(pending) > 2 * self._pool.size:
                recorded += self._record(*pending.popleft())
        while pending:
            recorded += self._record(*pending.popleft())
        return recorded > 0

    def _record(self, devices: Sequence[int], result: Callable[[], Sequence[bytes | Left]]) -> int:
        """Send what devices have computed; return how many steps were accepted."""
        return sum(self._send(device, made) for device, made in zip(devices, result(), strict=True))

    def _send(self, device: int, made: bytes | Left) -> bool:
        if isinstance(made, Left):
            self._lose(device)
            return False
        request = messages.SecureAggregationStepRequest.FromString(made)
        try:
            self._coordinator.take_step(device, request)
        except QflareError as error:
            self._silent.add(device)
            self._on_refused(self._round, error)
            return False
        return True
