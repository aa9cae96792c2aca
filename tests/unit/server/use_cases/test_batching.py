"""Who commits waits for those who are about to come, never for nobody and never for long."""

import threading
import time
from contextlib import suppress

from qflare_server.use_cases.updates.batching import BatchWindow

LONG_S = 60.0
SHORT_S = 0.05


def test_nobody_on_the_way_is_not_waited_for() -> None:
    begun = time.monotonic()

    BatchWindow(LONG_S).wait()

    assert time.monotonic() - begun < LONG_S / 2


def test_the_last_to_come_ends_the_wait() -> None:
    gathering = BatchWindow(LONG_S)
    waited = threading.Event()

    def wait() -> None:
        gathering.wait()
        waited.set()

    with gathering.announced() as first, gathering.announced():
        waiter = threading.Thread(target=wait)
        waiter.start()
        first()
        first()
        assert not waited.wait(SHORT_S)
    waiter.join(LONG_S)

    assert waited.is_set()


def test_one_that_never_comes_is_not_waited_for_long() -> None:
    gathering = BatchWindow(SHORT_S)

    with gathering.announced():
        gathering.wait()


def test_a_failure_on_the_way_is_the_end_of_it() -> None:
    gathering = BatchWindow(LONG_S)
    begun = time.monotonic()

    with suppress(ZeroDivisionError), gathering.announced():
        1 / 0  # noqa: B018
    gathering.wait()

    assert time.monotonic() - begun < LONG_S / 2
