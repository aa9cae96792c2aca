import threading
from collections.abc import Iterator

import numpy as np
import pytest

from qflare_server.strategies import Contribution
from qflare_server.strategies import blocks as module
from qflare_server.strategies.blocks import BLOCK, blocks, cosine_of, in_order, norm_of
from qflare_server.strategies.testkit import reader_of


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


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK])
def test_norms_and_cosines_do_not_depend_on_slices_and_threads(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, size = np.random.default_rng(7), 5 * BLOCK + 3
    update, base, direction = random.standard_normal((3, size), np.float32)
    read, towards = reader_of(base), reader_of(direction)
    contribution = Contribution("a", 1, reader_of(update), full_weights=True)
    whole = norm_of(contribution, read, size), cosine_of(contribution, read, towards, size)
    monkeypatch.setattr(module, "SLICE", length)

    for threads in (1, 2, 4):
        assert norm_of(contribution, read, size, threads) == whole[0]
        assert cosine_of(contribution, read, towards, size, threads) == whole[1]
