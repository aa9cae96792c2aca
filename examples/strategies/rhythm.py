"""Training time with slow devices: synchronous rounds compared with an asynchronous buffer.

Time is simulated: one training takes one unit on a fast device and five on a slow one, with 10% random variation.
Transfers and aggregation take no time. Devices behave like the SDK's loop: they train from the latest version,
contribute once per base version, and then wait for the next version.
"""

import heapq
from collections.abc import Iterator

import numpy as np
from federation import SEED, Fleet, Server, Vector, reader
from model import initial_weights

from qflare_server.strategies import Contribution, Strategy

SLOW_FACTOR = 5.0
Timeline = list[tuple[float, float]]
"""Points (time, accuracy), in order."""


class Stopwatch:
    """Simulated training times; every third device is slow."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(SEED)

    def training_time(self, device: int) -> float:
        """Return the duration of one training of a device."""
        usual = SLOW_FACTOR if device % 3 == 2 else 1.0  # noqa: PLR2004
        return usual * float(self._random.uniform(0.9, 1.1))


def synchronous(fleet: Fleet, strategy: Strategy, end: float, closes_at: int) -> Timeline:
    """Train in rounds that close at `closes_at` updates; later updates are discarded."""
    server = Server(strategy, fleet.model.flat(initial_weights(SEED)))
    watch, now, number = Stopwatch(), 0.0, 0
    timeline = [(0.0, fleet.accuracy(server.weights))]
    while now < end:
        number += 1
        arrivals = sorted((watch.training_time(index), index) for index in range(len(fleet.parts)))
        taken = [index for _, index in arrivals[:closes_at]]
        now += arrivals[closes_at - 1][0]
        base = server.weights
        server.publish(
            [_contribution(fleet, index, fleet.change(base, index, number)) for index in taken]
        )
        timeline.append((now, fleet.accuracy(server.weights)))
    return timeline


class Buffer:
    """Asynchronous training: every `buffer_size` updates become a version, whatever their base versions."""

    def __init__(
        self, fleet: Fleet, strategy: Strategy, buffer_size: int, max_staleness: int
    ) -> None:
        self._fleet = fleet
        self._server = Server(strategy, fleet.model.flat(initial_weights(SEED)))
        self._buffer_size = buffer_size
        self._max_staleness = max_staleness
        self._watch = Stopwatch()
        self._version = 0
        self._buffer: list[Contribution] = []
        self._waiting: list[int] = []
        self._training: list[tuple[float, int, int, Vector]] = []
        """Heap of (time of arrival, device, base version, change)."""

    def run(self, end: float) -> Iterator[tuple[float, float]]:
        """Yield (time, accuracy) of every version."""
        yield 0.0, self._fleet.accuracy(self._server.weights)
        for device in range(len(self._fleet.parts)):
            self._begin(0.0, device)
        while True:
            now, device, base_version, change = heapq.heappop(self._training)
            if now > end:
                return
            if self._arrive(device, base_version, change):
                yield now, self._fleet.accuracy(self._server.weights)
                ready, self._waiting = [*self._waiting, device], []
                for waiting in ready:
                    self._begin(now, waiting)
            elif base_version == self._version:
                self._waiting.append(device)
            else:
                self._begin(now, device)

    def _begin(self, now: float, device: int) -> None:
        change = self._fleet.change(self._server.weights, device, self._version + 1)
        arrival = now + self._watch.training_time(device)
        heapq.heappush(self._training, (arrival, device, self._version, change))

    def _arrive(self, device: int, base_version: int, change: Vector) -> bool:
        """Add an update to the buffer; return whether the buffer was aggregated."""
        staleness = self._version - base_version
        if staleness <= self._max_staleness:
            entry = _contribution(self._fleet, device, change, staleness, base_version)
            self._buffer.append(entry)
        if len(self._buffer) < self._buffer_size:
            return False
        self._server.publish(self._buffer)
        self._buffer = []
        self._version += 1
        return True


def _contribution(
    fleet: Fleet, device: int, change: Vector, staleness: int = 0, base_version: int = 0
) -> Contribution:
    return Contribution(
        f"{device:03}/{base_version}",
        len(fleet.parts[device]),
        reader(change),
        staleness=staleness,
    )


def time_to(timeline: Timeline, target: float) -> float | None:
    """Return the time at which the accuracy reached a target, None if it did not."""
    return next((time for time, accuracy in timeline if accuracy >= target), None)
