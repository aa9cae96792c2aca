"""Project template: a device program, the configuration of a training session, a first model and a README.

The files of `template/` are copied unchanged. `first_model` of the copied program creates the first model, so that
program and model match.
"""

import os
import runpy
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from safetensors.numpy import save_file

from qflare.files import make_private_folder, private_opener

PROGRAM: Final = "device.py"
MODEL: Final = "initial.safetensors"
_NAMES: Final = {
    PROGRAM: PROGRAM,
    "session.json": "session.json",
    "README.md": "README.md",
    "gitignore": ".gitignore",
}


def create_project(folder: Path) -> list[Path]:
    """Write a project into a new or empty folder; return its files.

    Raises:
        FileExistsError: The folder is not empty.
        OSError: It cannot be written.
    """
    make_private_folder(folder)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    with as_file(files(__name__) / "template") as template:
        for source, target in _NAMES.items():
            with open(
                folder / target, "xb", opener=private_opener
            ) as file:  # Path.open has no opener
                file.write((template / source).read_bytes())
    program = runpy.run_path(os.fspath(folder / PROGRAM))
    save_file(program["first_model"](), folder / MODEL)
    return sorted(folder.iterdir())
