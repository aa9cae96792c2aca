"""A monotonic clock that a test moves on."""

import itertools


class SteadyTime:
    """Goes on by a microsecond with each look, and by as much as a test wants; thread-safe."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        self._passed_s = 0.0

    def __call__(self) -> float:
        return self._passed_s + next(self._ticks) * 1e-6

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds
