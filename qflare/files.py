"""Files and folders that are their user's alone, and durable files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast


def make_private_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, with mode 0700; leave one that is there as it is.

    `Path.mkdir(parents=True)` gives its mode to the last folder only.

    Raises:
        OSError: It cannot be made, or is a file.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir()  # raises what it is instead


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=private_opener)`: one that is made has mode 0600."""
    return os.open(path, flags, 0o600)


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Yield a file of mode 0600 that gets the name `path`, durably, at the end of the block; an error leaves no file.

    It is written beside its name, synchronized, and put in place in one step: after a crash a file is the earlier or
    the later one, whole.

    Args:
        path: Name; its folder exists.
        replace: Take the place of a file that is there; otherwise that is an error.

    Raises:
        FileExistsError: There is a file of this name, and it is not to be replaced.
        OSError: The file cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield cast("BinaryIO", file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    synchronize_folder(path.parent)


def synchronize_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: The folder cannot be opened or synchronized.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
