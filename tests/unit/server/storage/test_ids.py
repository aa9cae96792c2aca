"""Names do not repeat, whatever the program around does with the shared generator or with processes."""

import os
import random
import time

import pytest

from qflare_server.storage.ids import payload_name, unique_name


@pytest.mark.parametrize("bits", [4, 64, 128])
def test_name_has_its_length_in_hex(bits: int) -> None:
    name = unique_name(bits)

    assert len(name) == bits // 4
    assert int(name, 16) >= 0


def test_names_do_not_follow_the_shared_seed() -> None:
    random.seed(0)
    first = unique_name(128)
    random.seed(0)

    assert unique_name(128) != first


def test_payloads_sort_by_their_time() -> None:
    first = payload_name()
    time.sleep(0.002)
    second = payload_name()

    assert len(first) == len(second) == 32
    assert first < second


def test_forked_process_has_names_of_its_own() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover - in the child
        os.write(writing, unique_name(128).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        of_child = told.read().decode()

    assert len(of_child) == 32
    assert unique_name(128) != of_child
