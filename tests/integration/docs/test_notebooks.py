"""The notebooks of examples/notebooks run from empty folders, and say what is committed of them."""

import ast
import base64
import copy
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[3]
FOLDER: Final = ROOT / "examples/notebooks"
INTERPRETERS: Final = {
    "digits": ".venv-notebooks",
    "flower": ".venv-flower",
    "robust_and_private": ".venv-notebooks",
}
"""Environment of each notebook."""
NOTEBOOKS: Final = sorted(INTERPRETERS)
TIMEOUT_S: Final = 600
TOLERANCE: Final = 0.05
"""How far numbers may be from the committed ones: other processors sum in another order."""
NUMBER: Final = re.compile(r"\d+\.\d+|\bNaN\b")
BEST: Final = re.compile(r"(?<=^best version )\d+", re.MULTILINE)
"""Which of two versions of nearly the same accuracy is the best may differ as well."""
OF_THIS_MACHINE: Final = re.compile(
    r"(?<![\w./:<])/[A-Za-z][\w.-]*/[\w.-]"  # an absolute path; not `</td>`, a URL or a relative path
    r"|(?<!\w)[A-Za-z]:\\|~/|file://|0x[0-9a-f]{6,}"
    r"|\d+\.\d+\.\d+\.\d+:[1-9]|localhost|\x1b"
)

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    found: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return found


def joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield kind and text of everything that a cell has put out; pictures as their bytes in Latin-1."""
    for output in cell["outputs"]:
        if "text" in output:
            yield output["name"], joined(output["text"])
        for kind, data in output.get("data", {}).items():
            text = joined(data)
            yield kind, base64.b64decode(text).decode("latin-1") if kind == "image/png" else text


def failed_cells(notebook: Notebook) -> list[str]:
    """Return what a cell raised or wrote to standard error."""
    return [
        f"{cell['id']}: {output.get('ename', 'stderr')}"
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]


def unrun_cells(notebook: Notebook) -> list[str]:
    """Return cells that were not run once, in order, and `code` if other code was run."""
    cells = code_cells(notebook)
    found = [
        cell["id"]
        for number, cell in enumerate(cells, start=1)
        if cell["execution_count"] != number
    ]
    code = "\0".join(joined(cell["source"]) for cell in cells)
    if notebook["metadata"].get("executed") != hashlib.sha256(code.encode()).hexdigest():
        found.append("code")
    return found


def traces_of_a_machine(notebook: Notebook) -> list[str]:
    """Return absolute paths, addresses and names of the machine that it ran on."""
    folders = {str(ROOT), str(Path.home())} - {"/"}
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    found = []
    for cell in notebook["cells"]:
        texts = [("source", joined(cell["source"]))]
        texts += outputs(cell) if cell["cell_type"] == "code" else []
        for kind, text in texts:
            found += [f"{cell['id']}: {folder}" for folder in folders if folder in text]
            # A short name of a host may be a word of the source, or bytes of a picture.
            traces = [OF_THIS_MACHINE] * (kind != "image/png")
            traces += [host] * (kind not in {"image/png", "source"})
            found += [f"{cell['id']}: {hit[0]}" for trace in traces if (hit := trace.search(text))]
    return found


def assert_same_text(executed: str, committed: str) -> None:
    """Compare texts, numbers with a fractional part within `TOLERANCE` of the larger."""
    executed, committed = BEST.sub("V", executed), BEST.sub("V", committed)
    assert NUMBER.sub("N", executed).split() == NUMBER.sub("N", committed).split()
    for one, other in zip(NUMBER.findall(executed), NUMBER.findall(committed), strict=True):
        if "NaN" in {one, other}:
            assert one == other
        else:
            assert float(one) == pytest.approx(float(other), rel=TOLERANCE, abs=TOLERANCE)


@pytest.fixture(params=NOTEBOOKS)
def committed(request: pytest.FixtureRequest) -> Notebook:
    return read(FOLDER / f"{request.param}.ipynb")


def test_every_notebook_is_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NOTEBOOKS


def test_no_cell_has_failed(committed: Notebook) -> None:
    assert failed_cells(committed) == []


def test_every_cell_has_run_as_it_is(committed: Notebook) -> None:
    assert unrun_cells(committed) == [], "run make notebooks"


def test_nothing_tells_of_the_machine(committed: Notebook) -> None:
    assert traces_of_a_machine(committed) == []
    assert set(committed["metadata"]) == {"executed", "kernelspec", "language_info"}
    assert committed["metadata"]["language_info"] == {"name": "python"}
    assert [cell["id"] for cell in committed["cells"] if cell["metadata"]] == []


def test_every_code_cell_is_python_or_a_file(committed: Notebook) -> None:
    for cell in code_cells(committed):
        source = joined(cell["source"])
        if not source.startswith("%%writefile "):
            ast.parse(source)


def stream(name: str, text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


ERROR: Final = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
HTML: Final = "<td>/srv/data/x</td>"


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (failed_cells, lambda cell: cell["outputs"].append(ERROR)),
        (failed_cells, lambda cell: cell["outputs"].append(stream("stderr", "warning"))),
        (unrun_cells, lambda cell: cell["source"].append("\nx = 1")),
        (unrun_cells, lambda cell: cell.update(execution_count=None)),
        (unrun_cells, lambda cell: cell.update(execution_count=2)),
        (traces_of_a_machine, lambda cell: cell["source"].append("\nopen('/srv/data/x')")),
        (traces_of_a_machine, lambda cell: cell["outputs"].append(stream("stdout", "at /var/x"))),
        (traces_of_a_machine, lambda cell: cell["outputs"].append(stream("stdout", "<o at 0x7f12ab34>"))),
        (traces_of_a_machine, lambda cell: cell["outputs"].append(stream("stdout", "on 127.0.0.1:4711"))),
        (traces_of_a_machine, lambda cell: cell["outputs"].append(stream("stdout", str(ROOT)))),
        (
            traces_of_a_machine,
            lambda cell: cell["outputs"].append(stream("stdout", f"on {socket.gethostname()}")),
        ),
        (
            traces_of_a_machine,
            lambda cell: cell["outputs"].append(
                {"output_type": "execute_result", "data": {"text/html": [HTML]}}
            ),
        ),
    ],
)  # fmt: skip
def test_the_checks_find(
    check: Callable[[Notebook], list[str]],
    change: Callable[[dict[str, Any]], None],
    committed: Notebook,
) -> None:
    changed = copy.deepcopy(committed)

    change(code_cells(changed)[0])

    assert check(changed) != []


@pytest.mark.parametrize(
    ("executed", "same"),
    [
        ("round 3  accuracy 0.9081", True),
        ("round 3 accuracy 0.9101", True),
        ("round 4 accuracy 0.9081", False),
        ("round 3 accuracy 0.7081", False),
        ("round 3 accuracy NaN", False),
        ("round 3 accuracy 0.9081 late", False),
    ],
)
def test_numbers_are_compared_within_a_tolerance(executed: str, same: bool) -> None:
    if same:
        assert_same_text(executed, "round 3 accuracy 0.9081")
        return
    with pytest.raises(AssertionError):
        assert_same_text(executed, "round 3 accuracy 0.9081")


@pytest.mark.parametrize("page", ["README.md", "docs/README.md", "docs/simulation.md"])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pages_link_to_every_notebook(page: str, name: str) -> None:
    assert f"examples/notebooks/{name}.ipynb)" in (ROOT / page).read_text()


def test_links_of_notebooks_lead_to_files(committed: Notebook) -> None:
    targets = [
        target
        for cell in committed["cells"]
        if cell["cell_type"] == "markdown"
        for target in re.findall(r"\]\(([^)#:]+)\)", joined(cell["source"]))
    ]

    assert targets
    assert [target for target in targets if not (FOLDER / target).exists()] == []


def interpreter(environment: str) -> Path:
    """Return a Python that runs notebooks; skip, or fail where everything is required, without one."""
    found = ROOT / environment / "bin/python"
    if not next((ROOT / environment).glob("lib/python*/site-packages/nbclient"), None):
        reason = f"{environment} has no nbclient (make test installs it); notebooks were NOT run"
        if os.environ.get("QFLARE_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def execute(name: str, folder: Path) -> Notebook:
    """Run a notebook with a new home and nothing of this process's environment; return what it became."""
    programs, home = folder / "programs", folder / "home"
    programs.mkdir()
    home.mkdir()
    server = programs / "qflare-server"
    command = shlex.quote(str(Path(sys.executable).parent / "qflare-server"))
    server.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    server.chmod(0o755)
    done = subprocess.run(
        [
            interpreter(INTERPRETERS[name]),
            FOLDER / "execute.py",
            "--to",
            folder,
            FOLDER / f"{name}.ipynb",
        ],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **{key: os.environ[key] for key in ("TMPDIR",) if key in os.environ},
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return read(folder / f"{name}.ipynb")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_says_what_is_committed(name: str, tmp_path: Path) -> None:
    committed = read(FOLDER / f"{name}.ipynb")

    executed = execute(name, tmp_path)

    assert failed_cells(executed) == unrun_cells(executed) == traces_of_a_machine(executed) == []
    assert executed["metadata"] == committed["metadata"]
    for ran, kept in zip(executed["cells"], committed["cells"], strict=True):
        assert joined(ran["source"]) == joined(kept["source"])
        if ran["cell_type"] == "code":
            said, stated = list(outputs(ran)), list(outputs(kept))
            assert [kind for kind, _ in said] == [kind for kind, _ in stated]
            for (kind, text), (_, expected) in zip(said, stated, strict=True):
                if kind in {"stdout", "text/plain"}:
                    assert_same_text(text, expected)
