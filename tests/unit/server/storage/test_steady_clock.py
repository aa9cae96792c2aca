"""A coordinator's clock on SQLite, while the clock of its machine is set."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare_server.storage.steady_clock import MAX_GRADUAL, MAX_RATE, SteadyClock

START = datetime(2030, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class Machine:
    """A machine whose clock can be set."""

    def __init__(self) -> None:
        self.uptime_s = 0.0
        self.offset = timedelta()
        self.clock = SteadyClock(self.wall, lambda: self.uptime_s)

    def wall(self) -> datetime:
        """Return what the clock of the machine shows."""
        return START + timedelta(seconds=self.uptime_s) + self.offset

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.uptime_s += seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@given(st.lists(st.tuples(st.floats(0, 600), st.floats(-86_000, 86_000)), min_size=1, max_size=30))
def test_no_interval_is_wrong_by_more_than_the_rate(steps: list[tuple[float, float]]) -> None:
    machine = Machine()
    began = machine.clock()
    for wait_s, offset_s in steps:
        machine.offset = timedelta(seconds=offset_s / 2)
        before = machine.clock()
        machine.wait(wait_s)
        assert machine.clock() >= before

    real = timedelta(seconds=machine.uptime_s)
    slack = MICROSECOND * 3 * len(steps)
    assert abs(machine.clock() - began - real) <= real * MAX_RATE + slack


@pytest.mark.parametrize("hours", [-1, 1])
def test_time_of_the_machine_is_approached(machine: Machine, hours: int) -> None:
    machine.offset = timedelta(hours=hours)
    for _ in range(36_000):
        machine.wait(1)
        machine.clock()

    assert machine.clock() == machine.wall()


@pytest.mark.parametrize("sign", [-1, 1])
def test_clock_that_was_never_set_is_adopted_at_once(machine: Machine, sign: int) -> None:
    machine.offset = sign * 2 * MAX_GRADUAL

    assert machine.clock() == machine.wall()
