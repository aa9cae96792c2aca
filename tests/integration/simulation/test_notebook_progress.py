"""The progress of a simulation in the kernel of a notebook is one output that is replaced, not a file of lines."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
INTERPRETER = ROOT / ".venv-notebooks/bin/python"
CELL = """
import numpy as np
from qflare_simulation import Progress, simulate

def train(arrays, task, data):
    return {name: array + np.float32(data) for name, array in arrays.items()}, 1, {"loss": 1.0}

settings = {"total_rounds": 3, "rounds.quorum": 3, "simulation": {"workers": -1}}
with Progress("counting\\x1b[2J") as progress:
    simulate(train, [1, 1, 1], settings, model={"w": np.zeros(2, np.float32)}, notice=progress)
"""


def test_progress_in_a_notebook_is_one_line_that_ends_complete(tmp_path: Path) -> None:
    if not INTERPRETER.exists():
        reason = f"{INTERPRETER} does not exist; the notebook was NOT run"
        if os.environ.get("QFLARE_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    notebook: dict[str, Any] = {"cells": [{**cell, "source": CELL}], "metadata": {}, "nbformat": 4}
    path = tmp_path / "progress.ipynb"
    path.write_text(json.dumps({**notebook, "nbformat_minor": 5}))
    done = tmp_path / "done"
    done.mkdir()

    execute = ROOT / "examples/notebooks/execute.py"
    subprocess.run([INTERPRETER, execute, "--to", done, path], check=True, timeout=300)

    (executed,) = json.loads((done / path.name).read_text())["cells"]
    (output,) = executed["outputs"]
    assert output["output_type"] == "display_data"
    assert list(output["data"]) == ["text/plain"]
    line = "".join(output["data"]["text/plain"])
    assert line.startswith("counting")
    assert line.endswith(f"[{'=' * 30}] 3/3, 3/3 updates")
    assert line.isprintable()
