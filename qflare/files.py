"""Private files and folders, atomic and durable file writes, and JSON as people and other programs write it."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents with mode 0700; leave existing folders unchanged.

    `Path.mkdir(parents=True)` applies its mode to the last folder only.

    Raises:
        OSError: The folder cannot be created, or the path is a file.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir()  # raises the appropriate error


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=private_opener)`; new files get mode 0600."""
    return os.open(path, flags, 0o600)


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """Yield a file of mode 0600 that is durably moved to `path` at the end of the block, or removed on an error.

    The file is written to a temporary name in the same folder, synchronized and moved into place atomically. After a
    crash, `path` holds either the old or the new content in full.

    Args:
        path: Final path; its folder must exist.
        replace: Replace an existing file; otherwise an existing file is an error.

    Raises:
        FileExistsError: The file exists and `replace` is false.
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
    """Synchronize a folder, so that new and renamed entries are durable.

    Raises:
        OSError: The folder cannot be opened or synchronized.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """Return what a text in JSON says.

    Raises:
        ValueError: It is no JSON, or an object has a key twice, of which the last one would count without a word.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key twice in one object")
    return entries
