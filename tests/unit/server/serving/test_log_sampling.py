"""Sampled log lines: the first of a kind in each period, and a count of the others."""

import pytest

from qflare_server.serving.rpc.log_sampling import LINES, MAX_KINDS, PERIOD_S, LogSampler


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sampler(clock: Clock) -> LogSampler:
    return LogSampler(clock)


def test_repeated_lines_are_left_out_until_the_period_ends(
    sampler: LogSampler, clock: Clock
) -> None:
    first = [sampler.take("a") for _ in range(LINES + 5)]
    clock.now += PERIOD_S
    second = [sampler.take("a") for _ in range(2)]

    assert first == [0] * LINES + [None] * 5
    assert second == [5, 0]


def test_kinds_do_not_hide_each_other(sampler: LogSampler) -> None:
    for _ in range(100):
        sampler.take("loud")

    assert sampler.take("quiet") == 0


def test_lines_are_bounded_however_many_kinds_there_are(sampler: LogSampler) -> None:
    logged = sum(sampler.take(number) is not None for number in range(20 * MAX_KINDS))

    assert logged <= MAX_KINDS + LINES


def test_quiet_kinds_make_room(sampler: LogSampler, clock: Clock) -> None:
    for number in range(MAX_KINDS):
        sampler.take(number)
    clock.now += PERIOD_S

    assert [sampler.take(("new", number)) for number in range(2 * LINES)] == [0] * (2 * LINES)
