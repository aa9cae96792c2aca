"""The structure of the packages holds: layers are exhaustive, names tell modules apart, prose names what exists."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.structure.rooms import (
    PACKAGES,
    ROOT,
    Structure,
    declared_layers,
    direct_arrows,
    longest_chain,
    reachable,
    read_structure,
)
from tests.structure.stated_names import Index, find_stale, stale_names, stale_names_of_page

CONTAINERS = tuple(declared_layers())
PLACEHOLDERS = {"utils", "helpers", "common", "misc", "base", "manager", "util", "helper", "shared"}
MOST_ENTRIES = 16


def modules(package: str) -> list[tuple[str, ...]]:
    """Return the dotted names of the modules and packages of a package, split."""
    paths = [
        path.parent if path.name == "__init__.py" else path.with_suffix("")
        for path in (ROOT / package).rglob("*.py")
    ]
    return [path.relative_to(ROOT).parts for path in paths]


def lint_imports(folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with copies of the packages and of their contracts."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copyfile(ROOT / "setup.cfg", tmp_path / "setup.cfg")
    return tmp_path


def test_the_contracts_hold_in_a_copy(copy: Path) -> None:
    done = lint_imports(copy)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_loose_module_fails_the_lint(container: str, copy: Path) -> None:
    (copy / container.replace(".", "/") / "loose_module.py").write_text('"""Belongs nowhere."""\n')

    done = lint_imports(copy)

    assert done.returncode != 0
    assert f"{container}.loose_module" in done.stdout


def test_an_import_that_points_up_fails_the_lint(copy: Path) -> None:
    path = copy / "qflare_server" / "storage" / "ids.py"
    path.write_text(f"{path.read_text()}\nimport qflare_server.context\n")

    assert lint_imports(copy).returncode != 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_exhaustive_layers(package: str) -> None:
    contracts = (ROOT / "setup.cfg").read_text().split("[importlinter:contract:")[1:]
    layered = [contract for contract in contracts if "type = layers" in contract]

    assert package in CONTAINERS
    assert [contract for contract in layered if "exhaustive = True" not in contract] == []


def test_the_listing_of_the_server_is_short() -> None:
    shown = [path for path in (ROOT / "qflare_server").iterdir() if path.name != "__pycache__"]
    beside = {"__init__.py", "py.typed"}

    assert len([path for path in shown if path.name not in beside]) <= MOST_ENTRIES


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_one_name_are_told_apart_by_their_packages(package: str) -> None:
    names = Counter(parts[-2:] for parts in modules(package) if len(parts) > 1)

    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_named_for_nothing(package: str) -> None:
    assert [parts for parts in modules(package) if parts[-1] in PLACEHOLDERS] == []


def test_floors_and_arrows_are_counted_right() -> None:
    arrows = frozenset({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")})
    small = Structure("p", (("a",), ("b",), ("c", "d")), arrows, 4)

    assert longest_chain(small.rooms, arrows) == small.floors == 3
    assert small.imports_of("a") == ["b", "c", "d"]
    assert direct_arrows(small) == [("a", "b"), ("a", "d"), ("b", "c")]


@pytest.mark.parametrize("package", PACKAGES)
def test_direct_arrows_imply_all_others(package: str) -> None:
    structure = read_structure(package)
    direct = frozenset(direct_arrows(structure))

    for room in structure.rooms:
        assert reachable(room, direct) == reachable(room, structure.arrows)


def test_prose_names_nothing_that_does_not_exist() -> None:
    assert [str(stale) for stale in find_stale()] == []


STALE = {
    "a module": "Bytes are in `qflare_server.sealed_payloads`.",
    "a module without quotes": "Bytes are in qflare_server.sealed_payloads, as ever.",
    "a module of a package around": "Pages are cut in `storage.pages`.",
    "an attribute of a module": "Limits are in `limits.Streams`.",
    "a method": "`Aggregator.run_twice` makes a pass.",
    "a field of a message": "`UpdateStatement.payload_hash` is the digest.",
    "an identifier": "`device_recordings` documents it.",
    "a file": "The table is in rpc.py.",
}
FRESH = {
    "a private class of the module": "`_CallScope.finish` ends the call.",
    "a module": "Keys are in `qflare_server.payloads.keys`.",
    "a module of a package around": "Pages are cut in `storage.paging`.",
    "an attribute of a module": "Limits are in `rpc.limits.StreamLimits`.",
    "a method": "`Aggregator.run_once()` makes a pass.",
    "an inherited attribute": "`Coordinator.draining` is set.",
    "a field of a message": "`UpdateStatement.payload_digest` is the digest.",
    "a method of a service": "`CoordinatorService.SubmitUpdate` uploads.",
    "a name of the standard library": "`threading.Event` and `hashlib`.",
    "a file": "The table is in rpc/status.py, `serving/rpc/status.py`.",
}


MODULE = "qflare_server.serving.rpc.interceptor"


@pytest.fixture(scope="module")
def index() -> Index:
    """Return everything that a stated name may be."""
    return Index(ROOT)


@pytest.mark.parametrize("what", STALE)
def test_a_name_of_nothing_is_found(what: str, index: Index) -> None:
    assert len(stale_names(index, MODULE, STALE[what])) == 1


@pytest.mark.parametrize("what", FRESH)
def test_a_name_of_something_is_not(what: str, index: Index) -> None:
    assert stale_names(index, MODULE, FRESH[what]) == []


def test_a_manual_is_searched_for_dotted_names_and_files(index: Index) -> None:
    line = "See `storage.pages`, `storage.paging`, `anything`, rpc.py and example.py."

    assert stale_names_of_page(index, line, {"example.py"}) == ["storage.pages", "rpc.py"]
