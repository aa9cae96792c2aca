import threading
from collections.abc import Iterator

import pytest

from qflare_server.strategies.blocks import blocks, in_order


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_ranges(threads: int) -> None:
    ranges = list(blocks(103, 10))

    results = list(in_order(lambda start, stop: stop - start, ranges, threads))

    assert results == [(start, stop, stop - start) for start, stop in ranges]


@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_are_taken_no_further_than_needed(threads: int) -> None:
    taken: list[int] = []

    def watched() -> Iterator[tuple[int, int]]:
        for start, stop in blocks(100, 1):
            taken.append(start)
            yield start, stop

    results = in_order(lambda start, _: start, watched(), threads)
    next(results)

    assert len(taken) <= threads + 1


def test_one_thread_is_the_callers() -> None:
    names = [name for _, _, name in in_order(lambda _, __: threading.get_ident(), [(0, 1)], 1)]

    assert names == [threading.get_ident()]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_exception_reaches_the_caller(threads: int) -> None:
    def work(start: int, stop: int) -> float:
        return 1.0 / (start + stop - 11)

    with pytest.raises(ZeroDivisionError):
        list(in_order(work, blocks(10, 1), threads))
