"""Norms, dot products and Gram matrices, summed over fixed blocks so that results are reproducible bit for bit.

Statistics of a whole vector are taken over blocks that start at multiples of their length (`BLOCK` elements for a
norm or a dot product, `GRAM_BLOCK` for a Gram matrix), and the blocks' figures are added in order. Every figure comes
from arrays of one shape, so the budget, the slice size and the number of threads never change a bit.

The Gram matrix is a product of the BLAS library, held to one thread of its own: the bytes then do not depend on its
thread settings, and products this small are slower with threads that wait for a busy core. Another kind of processor
may still differ in the last bits. Coefficients derived from it are recorded in the outcome, so a version can be
recomputed anywhere from the record.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from math import fsum, inf, sqrt
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qflare_server.strategies.types import Contribution, Reader, Vector

LARGEST_NORM: Final = 1e150
"""Longest delta that is compared with others: the square of anything longer, or a sum of such squares over ten million
updates, may exceed float64. No model is trained there; an update beyond it is refused."""

BLOCK = 65_536
"""Elements in a block of a statistics pass: 512 KiB of float64, which a second-level cache holds."""

GRAM_BLOCK = 8_192
"""Elements in one product of a Gram matrix: 100 updates of them are 6.6 MB of float64. A divisor of `BLOCK`."""

SLICE = 2 * 1024 * 1024
"""Elements that a pass reads of an update at once: 8 MiB of float32, a whole number of chunks where a payload begins
with them. A multiple of `BLOCK`."""

_READ_AHEAD = 4
"""Products computed from one read, so that readers are not called for tiny ranges."""
_READ_AHEAD_BYTES = 16 * 1024 * 1024


def blocks(stop: int, size: int = BLOCK, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive blocks from `start` to `stop`; the last may be shorter."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def delta_of(contribution: Contribution, base: Reader, start: int, stop: int) -> Vector:
    """Read a slice of an update's delta as a float64 array the caller owns; infinite where it exceeds float64."""
    values = np.array(contribution.read(start, stop), dtype=np.float64)
    if contribution.full_weights:
        with np.errstate(over="ignore"):
            values -= base(start, stop)
    return values


def squared_norm(values: NDArray[np.floating]) -> float:
    """Sum the squares of one block in float64 (numpy's pairwise summation, not BLAS); infinite on overflow."""
    wide = values.astype(np.float64, copy=False)
    with np.errstate(over="ignore"):
        return float(np.add.reduce(wide * wide))


def _exact_sum(parts: Iterable[float]) -> float:
    """Add figures of blocks exactly, none of them negative; infinite on overflow."""
    try:
        return fsum(parts)
    except OverflowError:
        return inf


def norm_of(
    contribution: Contribution, base: Reader, element_count: int, thread_count: int = 1
) -> float:
    """Compute the L2 norm of a delta by one pass over it; infinite where its square exceeds float64.

    Args:
        contribution: The update.
        base: The base version.
        element_count: `n`.
        thread_count: Threads that share the work; readers are called from all of them.
    """

    def work(start: int, stop: int) -> list[float]:
        delta = delta_of(contribution, base, start, stop)
        return [squared_norm(delta[first:last]) for first, last in blocks(delta.size)]

    slices = in_order(work, blocks(element_count, SLICE), thread_count)
    return sqrt(_exact_sum(square for _, _, squares in slices for square in squares))


def cosine_of(
    contribution: Contribution,
    base: Reader,
    direction: Reader,
    element_count: int,
    thread_count: int = 1,
) -> tuple[float, float | None]:
    """Compute a delta's norm and its cosine to a direction by one pass.

    Args:
        contribution: The update.
        base: The base version.
        direction: Of the previous aggregate.
        element_count: `n`.
        thread_count: Threads that share the work; readers are called from all of them.

    Returns:
        The norm, infinite where its square exceeds float64; and the cosine within [-1, 1], None when either vector is
        zero or too long to be compared.
    """

    def work(start: int, stop: int) -> list[tuple[float, float, float]]:
        delta = delta_of(contribution, base, start, stop)
        towards = direction(start, stop).astype(np.float64, copy=False)
        return [
            _products_of(delta[first:last], towards[first:last])
            for first, last in blocks(delta.size)
        ]

    slices = in_order(work, blocks(element_count, SLICE), thread_count)
    return norm_and_cosine([entry for _, _, entries in slices for entry in entries])


def norm_and_cosine(products: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Add the figures of blocks up to a norm and a cosine.

    Args:
        products: Of each block the squared norms of delta and direction, and their dot product.

    Returns:
        As of `cosine_of`.
    """
    norm = sqrt(_exact_sum(entry[0] for entry in products))
    length = sqrt(_exact_sum(entry[1] for entry in products))
    if not (0.0 < norm <= LARGEST_NORM and 0.0 < length <= LARGEST_NORM):
        return norm, None
    return norm, max(-1.0, min(1.0, fsum(entry[2] for entry in products) / norm / length))


def norm_figures(
    cohort: Sequence[Contribution],
    base: Reader,
    direction: Reader | None,
    start: int,
    stop: int,
    thread_count: int = 1,
) -> Iterator[NDArray[np.float64]]:
    """Yield the summands of norms and cosines over consecutive blocks, several blocks at once.

    Args:
        cohort: `k` updates.
        base: The base version.
        direction: Of the previous aggregate; None where no cosine is needed.
        start: First element, a multiple of `BLOCK`.
        stop: One past the last element.
        thread_count: Threads that share the work; readers are called from all of them.

    Yields:
        Arrays of shape (m, k, 3): of each block and update what `norm_and_cosine` takes; zeros for no direction.
    """

    def work(first: int, last: int) -> NDArray[np.float64]:
        bounds = list(blocks(last - first))
        figures = np.zeros((len(bounds), len(cohort), 3))
        towards = None if direction is None else direction(first, last).astype(np.float64)
        for row, contribution in enumerate(cohort):
            delta = delta_of(contribution, base, first, last)
            for number, (begin, end) in enumerate(bounds):
                if towards is None:
                    figures[number, row, 0] = squared_norm(delta[begin:end])
                else:
                    figures[number, row] = _products_of(delta[begin:end], towards[begin:end])
        return figures

    for _, _, figures in in_order(work, blocks(stop, SLICE, start), thread_count):
        yield figures


def _products_of(delta: Vector, towards: Vector) -> tuple[float, float, float]:
    """Return the squared norms of two blocks and their dot product."""
    with np.errstate(over="ignore", invalid="ignore"):
        dot = float(np.add.reduce(delta * towards))
    return squared_norm(delta), squared_norm(towards), dot


def gram_matrix(
    cohort: Sequence[Contribution],
    factors: Sequence[float],
    base: Reader,
    element_count: int,
    thread_count: int = 1,
) -> NDArray[np.float64]:
    """Compute all inner products of scaled deltas by one pass over the cohort.

    Args:
        cohort: `k` updates.
        factors: What each delta is multiplied by.
        base: The base version.
        element_count: `n`.
        thread_count: Threads that share the work; readers are called from all of them.

    Returns:
        A symmetric float64 array of shape (k, k). The products of an update longer than `LARGEST_NORM` may be
        infinite or NaN; those of the others are unaffected.
    """
    products = gram_products(cohort, factors, base, 0, element_count, thread_count)
    return sum_products(products, len(cohort))


def gram_products(
    cohort: Sequence[Contribution],
    factors: Sequence[float],
    base: Reader,
    start: int,
    stop: int,
    thread_count: int = 1,
) -> Iterator[NDArray[np.float64]]:
    """Yield the inner products of scaled deltas over consecutive blocks, several blocks at once.

    Args:
        cohort: `k` updates.
        factors: What each delta is multiplied by.
        base: The base version.
        start: First element, a multiple of `GRAM_BLOCK`.
        stop: One past the last element.
        thread_count: Threads that share the work; readers are called from all of them.

    Yields:
        Float64 arrays of shape (m, k, k), one matrix a block. Memory for each thread: at most 8,192 elements of
        every update in float64, and as many again, or up to 16 MiB, as read.
    """
    count = len(cohort)
    ahead = max(1, min(_READ_AHEAD, _READ_AHEAD_BYTES // (8 * GRAM_BLOCK * max(1, count))))

    def work(first: int, last: int) -> NDArray[np.float64]:
        return np.stack(_products(cohort, factors, base, first, last))

    with threadpool_limits(limits=1, user_api="blas"):
        for _, _, products in in_order(work, blocks(stop, ahead * GRAM_BLOCK, start), thread_count):
            yield products


def sum_products(parts: Iterable[NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    """Add matrices up in order.

    Args:
        parts: From `gram_products`.
        count: `k`, the number of updates.
    """
    total = np.zeros((count, count))
    for products in parts:
        for product in products.reshape(-1, count, count):
            with np.errstate(over="ignore", invalid="ignore"):
                total += product
    return total


def _products(
    cohort: Sequence[Contribution], factors: Sequence[float], base: Reader, start: int, stop: int
) -> list[NDArray[np.float64]]:
    """Compute the inner products over each block of a range."""
    slices = [contribution.read(start, stop) for contribution in cohort]
    origin = base(start, stop)
    matrix = np.empty((len(cohort), min(GRAM_BLOCK, stop - start)))
    products = []
    for first, last in blocks(stop - start, GRAM_BLOCK):
        part = matrix[:, : last - first]
        for row, contribution, factor, values in zip(part, cohort, factors, slices, strict=True):
            _load(row, values[first:last], contribution, factor, origin[first:last])
        with np.errstate(over="ignore", invalid="ignore"):
            products.append(part @ part.T)
    return products


def _load(
    row: Vector,
    values: NDArray[np.floating],
    contribution: Contribution,
    factor: float,
    origin: NDArray[np.floating],
) -> None:
    """Put a scaled delta into a row."""
    row[:] = values
    if contribution.full_weights:
        with np.errstate(over="ignore"):
            np.subtract(row, origin, out=row)
    if factor != 1.0:
        np.multiply(row, factor, out=row)


T = TypeVar("T")


def in_order(
    work: Callable[[int, int], T], ranges: Iterable[tuple[int, int]], thread_count: int
) -> Iterator[tuple[int, int, T]]:
    """Yield `(start, stop, work(start, stop))` for each range, in order.

    With one thread, or one range, everything runs in the caller's thread. With more, at most one range more than the
    threads is in progress, so memory stays bounded even if results are consumed slowly.

    Args:
        work: Safe to call from several threads at once when there are several.
        ranges: Taken lazily.
        thread_count: One or more.
    """
    rest = iter(ranges)
    begun = [*islice(rest, 1)], [*islice(rest, 1)]
    if thread_count == 1 or not begun[1]:
        for start, stop in chain(*begun, rest):
            yield start, stop, work(start, stop)
        return
    with ThreadPoolExecutor(thread_count) as pool:
        pending: deque[tuple[int, int, Future[T]]] = deque()
        for start, stop in chain(*begun, rest):
            pending.append((start, stop, pool.submit(work, start, stop)))
            if len(pending) > thread_count:
                first, last, job = pending.popleft()
                yield first, last, job.result()
        for first, last, job in pending:
            yield first, last, job.result()
