import threading

import pytest

from qflare_client.errors import BusyError, DeadlineExceededError, UnavailableError
from qflare_client.rpc.retry import Patience, RetryPolicy


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Waits(threading.Event):
    """An event nobody sets, whose waits move the clock and are recorded."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.delays_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.delays_s.append(timeout)
        self.clock.now_s += timeout
        return self.is_set()


def unavailable() -> UnavailableError:
    return UnavailableError("down", retry_after_s=0.0)


def wait_until_it_ends(patience: Patience, error: UnavailableError) -> None:
    for _ in range(1_000):
        patience.wait(error)


def test_an_error_without_a_delay_is_raised_at_once() -> None:
    clock = Clock()
    patience = Patience(RetryPolicy(), Waits(clock), clock)

    with pytest.raises(DeadlineExceededError):
        patience.wait(DeadlineExceededError("too slow"))

    assert clock.now_s == 0.0


def test_delays_stay_below_their_bounds_and_patience_ends() -> None:
    clock = Clock()
    waits = Waits(clock)
    patience = Patience(
        RetryPolicy(total_time_s=30, initial_delay_s=1, max_delay_s=4), waits, clock
    )

    with pytest.raises(UnavailableError):
        wait_until_it_ends(patience, unavailable())

    assert clock.now_s <= 30
    assert all(
        delay <= bound for delay, bound in zip(waits.delays_s, [1, 2, 4, 4, 4], strict=False)
    )
    assert max(waits.delays_s) <= 4


def test_a_delay_is_at_least_what_the_coordinator_asked_for() -> None:
    clock = Clock()
    waits = Waits(clock)
    patience = Patience(RetryPolicy(total_time_s=60, max_delay_s=0.1), waits, clock)

    patience.wait(BusyError("full", retry_after_s=7.0))

    assert 7.0 <= waits.delays_s[0] <= 7.1


def test_progress_starts_patience_again() -> None:
    clock = Clock()
    patience = Patience(RetryPolicy(total_time_s=10, max_delay_s=0.1), Waits(clock), clock)
    clock.now_s = 9.95

    patience.progressed()
    patience.wait(BusyError("full", retry_after_s=5.0))

    assert clock.now_s >= 14.9


def test_no_total_time_means_one_attempt() -> None:
    clock = Clock()
    patience = Patience(RetryPolicy(total_time_s=0), Waits(clock), clock)

    with pytest.raises(BusyError):
        patience.wait(BusyError("full", retry_after_s=0.001))


def test_closing_ends_a_wait() -> None:
    closed = threading.Event()
    closed.set()

    with pytest.raises(UnavailableError):
        Patience(RetryPolicy(total_time_s=60), closed).wait(unavailable())
