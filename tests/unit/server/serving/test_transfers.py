"""Places for transfers: who makes room when others wait, and who is taken next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qflare_server.errors import QflareError
from qflare_server.serving.rpc.transfers import WINDOW_S, TransferPool

MINIMUM = 1000.0
WAIT_S = 10.0


class Transfer:
    """A call that moves what its test says, until it is interrupted or let go."""

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.moved_bytes = 0
        self.waited_s = 0.0
        self.route = None
        self.running = threading.Event()
        self.over = threading.Event()
        self.error: QflareError | None = None

    def task(self) -> None:
        """Run until it is over."""
        self.running.set()
        self.over.wait(WAIT_S)

    def interrupt(self, error: QflareError) -> None:
        """Stop it."""
        self.error = error
        self.over.set()

    def move(self, seconds: float, bytes_per_s: float, waiting: float = 1.0) -> None:
        """Let time pass, a share of which the coordinator waits for the caller."""
        self.waited_s += seconds * waiting
        self.moved_bytes += round(seconds * waiting * bytes_per_s)


class Pool:
    """A pool with its transfers, and a clock that starts when it is asked for."""

    def __init__(self, place_count: int, max_waiting_per_caller: int = 4) -> None:
        self.displaced: list[Any] = []
        self.transfers: list[Transfer] = []
        self.pool = TransferPool(
            "transfer",
            place_count,
            min_bytes_per_s=MINIMUM,
            max_waiting_per_caller=max_waiting_per_caller,
            displaced=self.displaced.append,
        )

    def offer(self, caller: str) -> tuple[Transfer, bool]:
        """Put a transfer, and say whether it was taken."""
        transfer: Any = Transfer(caller)
        self.transfers.append(transfer)
        return transfer, self.pool.put(transfer)

    def start(self, caller: str) -> Transfer:
        """Put a transfer that gets a place at once."""
        transfer, taken = self.offer(caller)
        assert taken
        assert transfer.running.wait(WAIT_S)
        return transfer

    def close(self) -> None:
        """Let all end."""
        for transfer in self.transfers:
            transfer.over.set()
        self.pool.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def build(place_count: int, **options: int) -> Pool:
        made.append(Pool(place_count, **options))
        return made[-1]

    yield build
    for pool in made:
        pool.close()


def interrupted(*transfers: Transfer) -> list[bool]:
    return [transfer.error is not None for transfer in transfers]


def test_a_slow_transfer_keeps_its_place_while_nobody_waits(make: Callable[..., Pool]) -> None:
    pool = make(2)
    slow = pool.start("a")
    slow.move(10, 1.0)

    pool.pool.review(time.monotonic() + WINDOW_S)

    assert not slow.error


def test_the_slowest_makes_room_where_others_wait(make: Callable[..., Pool]) -> None:
    pool = make(2)
    slow, slower = pool.start("a"), pool.start("b")
    waiting, _ = pool.offer("c")
    slow.move(10, MINIMUM / 2)
    slower.move(10, MINIMUM / 4)

    pool.pool.review(time.monotonic() + WINDOW_S)

    assert interrupted(slow, slower) == [False, True]
    assert waiting.running.wait(WAIT_S)


@pytest.mark.parametrize(
    ("rate", "waiting_share"),
    [(2 * MINIMUM, 1.0), (MINIMUM / 10, 0.1)],
    ids=["fast enough", "held up by the coordinator"],
)
def test_a_transfer_that_is_not_slow_keeps_its_place(
    make: Callable[..., Pool], rate: float, waiting_share: float
) -> None:
    pool = make(1)
    busy = pool.start("a")
    pool.offer("b")
    busy.move(WINDOW_S, rate, waiting_share)

    pool.pool.review(time.monotonic() + WINDOW_S)

    assert not busy.error


def test_a_transfer_is_watched_before_it_is_judged(make: Callable[..., Pool]) -> None:
    pool = make(1)
    young = pool.start("a")
    pool.offer("b")
    young.move(WINDOW_S / 2, 0.0)

    pool.pool.review(time.monotonic() + WINDOW_S / 2)

    assert not young.error


def test_what_moved_long_ago_does_not_count(make: Callable[..., Pool]) -> None:
    pool = make(1)
    crawling = pool.start("a")
    pool.offer("b")
    now = time.monotonic()
    crawling.move(WINDOW_S, 100 * MINIMUM)
    pool.pool.review(now + WINDOW_S)
    crawling.move(2 * WINDOW_S, 1.0)
    pool.pool.review(now + 2 * WINDOW_S)
    assert crawling.error

    assert crawling.error.reason == "TOO_MANY_REQUESTS"


def test_a_caller_with_several_places_gives_one_to_a_caller_with_none(
    make: Callable[..., Pool],
) -> None:
    pool = make(3)
    first, second, other = pool.start("a"), pool.start("a"), pool.start("b")
    waiting, _ = pool.offer("c")
    for transfer in (first, second, other):
        transfer.move(WINDOW_S, 10 * MINIMUM)

    pool.pool.review(time.monotonic() + WINDOW_S)

    assert interrupted(first, second, other) == [False, True, False]
    assert waiting.running.wait(WAIT_S)


def test_places_go_to_callers_with_the_fewest_and_to_slow_ones_last(
    make: Callable[..., Pool],
) -> None:
    pool = make(2)
    slow, busy = pool.start("slow"), pool.start("busy")
    queued = [pool.offer(caller)[0] for caller in ("slow", "busy", "new")]
    slow.move(10, 1.0)
    busy.move(10, 10 * MINIMUM)

    pool.pool.review(time.monotonic() + WINDOW_S)

    again, more, new = queued
    assert new.running.wait(WAIT_S)
    new.over.set()
    assert more.running.wait(WAIT_S)
    assert not again.running.is_set()


def test_a_slow_caller_loses_its_place_in_a_full_line(make: Callable[..., Pool]) -> None:
    pool = make(1)
    slow = pool.start("slow")
    pool.offer("b")
    slow.move(10, 1.0)
    pool.pool.review(time.monotonic() + WINDOW_S)
    assert pool.transfers[1].running.wait(WAIT_S)
    again, taken = pool.offer("slow")
    assert taken
    assert pool.offer("c")[1]

    assert pool.offer("d")[1]

    assert pool.displaced == [again]


def test_one_caller_does_not_fill_the_line(make: Callable[..., Pool]) -> None:
    pool = make(2, max_waiting_per_caller=3)
    for _ in range(2):
        pool.start("a")
    assert [pool.offer("a")[1] for _ in range(4)] == [True, True, True, False]

    assert pool.offer("b")[1]
    assert pool.offer("c")[1]

    assert len(pool.displaced) == 1
