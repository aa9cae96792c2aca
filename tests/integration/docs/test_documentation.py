"""The README and the manuals: every shell and Python block runs, or is listed here with the reason why not."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any, Final

import pytest

from docs import make_training_settings
from qflare_client.project import create_project
from tests.support.manual_pages import FILE, ROOT, blocks, run_page

TYPED: Final = ("docs/notebooks.md", "docs/operations.md")
"""Pages that tests/packaging/test_journeys.py runs in an environment of their own."""
ELSEWHERE: Final = {
    "docs/administration.md": "test_administration_page.py",
    "docs/migrating.md": "tests/integration/flower/test_migrating_page.py, with flwr",
}
PAGES: Final = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md"))
    if str(page.relative_to(ROOT)) not in ELSEWHERE
)

NOT_RUN: Final = {
    ("docs/secure-aggregation.md", "make demo-secure"): "test_demo.py runs a short form of it",
    ("README.md", "make demo"): "minutes of training, and these tests themselves",
    ("README.md", "python3 -m venv .venv"): "tests/packaging/test_readme.py types the whole page",
    ("docs/getting-started.md", "python3 -m venv .venv"): "tests/packaging/test_wheel.py installs",
    ("docs/simulation.md", "pip install"): "the development install has it",
    (
        "docs/simulation.md",
        "qflare-admin session create",
    ): "needs a coordinator; test_config.py reads the file as a real session does",
    (
        "docs/devices.md",
        "with Client(home=home) as client:\n    for task in",
    ): "test_pulled_tasks.py runs this loop",
    ("docs/devices.md", "# torch_device.py"): "PyTorch is no part of the development install",
    ("docs/operations.md", "createuser"): "needs a PostgreSQL and its client programs",
    ("docs/benchmarks.md", "make bench"): "takes an hour",
    (
        "docs/strategies.md",
        "from qflare_server.strategies import StrategyConfig",
    ): "my_rule has to be installed; the tests of the test kit install one",
    ("docs/deploy/docker.md", "docker build"): "needs Docker; hadolint checks the Dockerfile",
    ("docs/deploy/docker.md", "docker run"): "needs Docker",
    (
        "docs/deploy/keys.md",
        "qflare-server keys prepare",
    ): "test_offline_root.py, with another folder",
    ("docs/deploy/keys.md", "QFLARE_PKCS11_MODULE="): "test_hardware_keys.py, where SoftHSM is",
    ("docs/deploy/systemd.md", "python3 -m venv /opt"): "needs root and systemd",
    ("docs/deploy/systemd.md", "systemctl enable"): "needs root and systemd",
}
"""Page and beginning of a block, with the reason why it is not run. Indented blocks, all of them in the pages on
Docker Compose and Kubernetes, need these programs; `make lint-deploy` checks the files that they name."""


def runs(text: str) -> bool:
    return any(block.language in {"sh", "python"} for block in blocks(text))


def excepted(page: str, code: str) -> bool:
    return any(page == name and code.startswith(start) for name, start in NOT_RUN)


def runnable(page: str) -> str:
    """Return a page without what is not run, and with Python blocks that are no files as shell blocks."""
    text = (ROOT / page).read_text()
    for block in reversed(blocks(text)):
        fence = block.start - len(block.language) - 1
        if excepted(page, block.code):
            text = f"{text[:fence]}text\n{text[block.start :]}"
        elif block.language == "python" and not FILE.match(block.code):
            code = f"sh\npython3 - <<'END_OF_BLOCK'\n{block.code}END_OF_BLOCK\n"
            text = f"{text[:fence]}{code}{text[block.stop :]}"
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in TYPED and runs(runnable(page))]
)
def test_every_block_of_the_page_runs(page: str, grpcurl: str, tmp_path: Path) -> None:
    run_page(runnable(page), tmp_path, str(Path(grpcurl).parent))


@pytest.mark.slow
def test_every_block_of_a_new_project_s_readme_runs(tmp_path: Path) -> None:
    project = tmp_path / "project"
    create_project(project)

    run_page((project / "README.md").read_text(), project, "")


@pytest.mark.parametrize(("page", "start"), NOT_RUN)
def test_what_is_not_run_is_still_there(page: str, start: str) -> None:
    codes = [block.code for block in blocks((ROOT / page).read_text())]

    assert any(code.startswith(start) for code in codes)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_the_page_is_python(page: str) -> None:
    for block in blocks((ROOT / page).read_text()):
        if block.language == "python":
            ast.parse(block.code)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_the_page_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())

    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_every_file_of_a_page_is_run_by_it_or_listed() -> None:
    for page in PAGES:
        found = blocks((ROOT / page).read_text())
        shell = "".join(block.code for block in found if block.language == "sh")
        for block in found:
            named = FILE.match(block.code) if block.language == "python" else None
            if named and not excepted(page, block.code):
                stem = named[1].removesuffix(".py")
                assert re.search(rf"\b{stem}(\.py|:)", shell), f"{page}: {named[1]} is not run"


def test_the_training_function_of_the_readme_is_that_of_the_project_template() -> None:
    template = (ROOT / "qflare_client/project/template/device.py").read_text()
    (code,) = [
        block.code
        for block in blocks((ROOT / "README.md").read_text())
        if block.language == "python"
    ]

    assert code in template


def test_every_manual_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]

    assert [page for page in pages if page != "README.md" and f"]({page})" not in index] == []


def test_the_table_of_settings_is_current() -> None:
    settings = load_make_settings()
    text = (ROOT / "docs/operations.md").read_text()

    assert settings.page(text) == text, "run python docs/make_settings.py"


def test_the_page_of_training_settings_is_the_protos() -> None:
    settings = make_training_settings
    assert settings.PAGE.read_text() == settings.page(), "run python -m docs.make_training_settings"


def load_make_settings() -> Any:
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
