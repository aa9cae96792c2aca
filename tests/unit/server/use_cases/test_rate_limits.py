"""How often one caller may call."""

import pytest

from qflare_server.errors import TooManyRequestsError
from qflare_server.use_cases.access.rate_limits import RateLimiter


class Seconds:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_ten_seconds_of_calls_may_come_at_once() -> None:
    rates = RateLimiter(2.0, Seconds())

    for _ in range(20):
        rates.take("device:1")

    with pytest.raises(TooManyRequestsError) as caught:
        rates.take("device:1")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    assert caught.value.subject == "device:1"


def test_calls_come_back_with_time() -> None:
    seconds = Seconds()
    rates = RateLimiter(2.0, seconds)
    for _ in range(20):
        rates.take("device:1")

    seconds.now += 0.5

    rates.take("device:1")
    with pytest.raises(TooManyRequestsError):
        rates.take("device:1")


def test_callers_do_not_share() -> None:
    rates = RateLimiter(0.1, Seconds())
    rates.take("device:1")

    rates.take("device:2")

    with pytest.raises(TooManyRequestsError):
        rates.take("device:1")


def test_zero_means_no_bound() -> None:
    rates = RateLimiter(0.0, Seconds())

    for _ in range(1000):
        rates.take("device:1")
