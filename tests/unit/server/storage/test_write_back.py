import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qflare.tensors import CHUNK_BYTES
from qflare_server.errors import StorageDamagedError
from qflare_server.storage.payload_store import write_back
from qflare_server.storage.payload_store.files import PayloadFolder

Call = Callable[[int, int, int, int], int]


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files that were synchronized, in order."""
    sizes: list[int] = []
    for name in ("fdatasync", "fsync"):
        original = getattr(os, name)

        def note(descriptor: int, original: Callable[[int], None] = original) -> None:
            sizes.append(os.fstat(descriptor).st_size)
            original(descriptor)

        monkeypatch.setattr(os, name, note)
    return sizes


def failing(number: int) -> Call:
    def call(_descriptor: int, _offset: int, _count: int, _flags: int) -> int:
        ctypes.set_errno(number)
        return -1

    return call


def chunk(number: int) -> bytes:
    return bytes([number]) * CHUNK_BYTES


def test_a_payload_is_synchronized_once_it_is_whole(
    tmp_path: Path, synchronized: list[int]
) -> None:
    store = PayloadFolder(tmp_path / "store")
    for number in range(3):
        store.append("p", number, [chunk(number)])
    arriving = list(synchronized)
    store.complete("p", 3 * CHUNK_BYTES)

    assert arriving == ([] if write_back._CALL else [CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES])
    assert 3 * CHUNK_BYTES in synchronized
    assert store.read("p", 0, 3) == [chunk(0), chunk(1), chunk(2)]


def test_a_chunk_of_a_whole_payload_is_synchronized_at_once(
    tmp_path: Path, synchronized: list[int]
) -> None:
    store = PayloadFolder(tmp_path / "store")
    store.append("p", 0, [chunk(0)])
    store.complete("p", CHUNK_BYTES)
    synchronized.clear()

    store.append("p", 0, [chunk(1)])

    assert synchronized == [CHUNK_BYTES]


@pytest.mark.parametrize("number", [None, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_system_without_the_call_synchronizes_every_batch(
    tmp_path: Path,
    synchronized: list[int],
    monkeypatch: pytest.MonkeyPatch,
    number: int | None,
) -> None:
    monkeypatch.setattr(write_back, "_CALL", None if number is None else failing(number))
    store = PayloadFolder(tmp_path / "store")

    store.append("p", 0, [chunk(0)])
    store.append("p", 1, [chunk(1)])

    assert synchronized == [CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_a_bad_disk_is_noticed_while_a_payload_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PayloadFolder(tmp_path / "store")
    store.append("p", 0, [chunk(0)])
    monkeypatch.setattr(write_back, "_CALL", failing(errno.EIO))

    with pytest.raises(StorageDamagedError):
        store.append("p", 1, [chunk(1)])

    assert store.stored_count("p") == 1
    with pytest.raises(StorageDamagedError):
        store.check()


def test_a_descriptor_that_is_closed_is_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    os.close(descriptor)

    if write_back._CALL is not None:
        with pytest.raises(OSError, match="descriptor"):
            write_back.write_back(descriptor, 0, 1)
