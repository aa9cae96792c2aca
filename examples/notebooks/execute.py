"""Runs the notebooks of this folder, each in a kernel of its own and an empty folder, and writes their outputs.

    make notebooks
    python examples/notebooks/execute.py [--to FOLDER] [NOTEBOOK ...]

Without `--to`, the notebooks themselves are written. A notebook whose cell fails is not written, and ends the program.
Needs nbclient and ipykernel. Kernels are reached by Unix sockets, not by ports. The metadata of a written notebook hold
the digest of the code that was run, so that outputs of other code are noticed.
"""

import argparse
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE: Final = Path(__file__).parent
TIMEOUT_S: Final = 300
METADATA: Final = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Metadata of every written notebook: those of a kernel name its version and its machine."""


def code_digest(cells: list[Any]) -> str:
    """Return the SHA-256 of the code cells of a notebook, 64 hex digits."""
    codes = (cell["source"] for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256("\0".join(codes).encode()).hexdigest()


def execute(path: Path) -> Any:
    """Return a notebook with the outputs of running it.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
        nbclient.exceptions.CellTimeoutError: A cell took longer than `TIMEOUT_S`.
    """
    notebook = nbformat.read(path, as_version=4)
    # A short name: the path of a Unix socket has at most 103 bytes on macOS.
    with TemporaryDirectory(prefix="nb") as private, TemporaryDirectory(prefix="nb") as folder:
        sockets = {"transport": "ipc", "ip": f"{private}/kernel"}
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT_S,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
            config=Config({"KernelManager": sockets}),
        )
        os.environ["JUPYTER_RUNTIME_DIR"] = private
        client.execute(env={**os.environ, "IPYTHONDIR": private})
    notebook.metadata = nbformat.from_dict({**METADATA, "executed": code_digest(notebook.cells)})
    return notebook


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description="run notebooks and write their outputs")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--to", type=Path, help="folder for the executed notebooks")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        executed = execute(path)
        nbformat.write(executed, (arguments.to or path.parent) / path.name)


if __name__ == "__main__":
    main()
