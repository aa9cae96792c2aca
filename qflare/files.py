"""Files and folders that are their user's alone, whatever the umask."""

import os
from pathlib import Path


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
