"""The page on architecture: made from the code where it can be, and true where it is written by hand."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from docs.make_architecture import PAGE, WIDTH, best_layout, page, pictures
from tests.structure.journeys import Journey, Journeys, travel
from tests.structure.rooms import PACKAGES, ROOT, read_structure, subpackages
from tests.structure.stated_names import class_members, defined

TEXT = PAGE.read_text()
LINK = re.compile(r"\[`([^`]+)`\]\(\.\./([^)]+)\)")
JOURNEYS = {
    "update": "The path of one small update",
    "download": "The path of one download",
    "enrollment": "The path of one enrollment",
}
MOST_ROOMS = 12
LEAST_STEPS = 5
POOLS = {"_pool", "_batches", "_transfers"}
THREAD_ARGUMENTS = {"name", "thread_name_prefix"}


@dataclass(frozen=True)
class Step:
    """A row of the table of a journey."""

    thread: str
    function: str
    path: str
    text: str


def section(title: str) -> str:
    """Return the text below a heading."""
    _, found, rest = TEXT.partition(f"\n## {title}\n")
    assert found, f"no section {title}"
    return rest.partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def steps(journey: str) -> list[Step]:
    found = []
    for _number, thread, function, text in rows(JOURNEYS[journey]):
        link = LINK.fullmatch(function)
        assert link is not None, function
        found.append(Step("" if thread == "SDK" else thread, link[1], link[2], text))
    return found


def definitions(path: Path) -> set[str]:
    """Return the names of a file's definitions, those in classes after the class's name and a dot."""
    tree = ast.parse(path.read_text())
    names = defined(tree.body)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in class_members(node).names}
    return names


def thread_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module gives to threads and pools of them."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func).rpartition(".")[2]
        values = [item.value for item in node.keywords if item.arg in THREAD_ARGUMENTS]
        if function in POOLS:
            values = node.args[:1]
        elif function not in {"Thread", "ThreadPoolExecutor"}:
            continue
        yield from (str(value.value) for value in values if isinstance(value, ast.Constant))


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> Journeys:
    """Return what a real enrollment, update and download run."""
    return travel(tmp_path_factory.mktemp("journeys"))


def test_the_tables_of_rooms_are_current() -> None:
    assert page(TEXT) == TEXT, "run make architecture"


def test_the_pictures_are_current() -> None:
    for path, picture in pictures().items():
        assert path.read_text() == picture, "run make architecture"
        assert f"](images/{path.name})" in TEXT


@pytest.mark.parametrize("package", PACKAGES)
def test_boxes_and_arrows_of_a_picture_fit(package: str) -> None:
    for row in best_layout(read_structure(package)).rows:
        edges = [(place.x - place.width / 2, place.x + place.width / 2) for place in row]

        assert min(left for left, _ in edges) >= 0
        assert max(right for _, right in edges) <= WIDTH
        assert all(right < left for (_, right), (left, _) in pairwise(edges))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_is_named(package: str) -> None:
    for room in read_structure(package).rooms:
        for name in (room, *subpackages(package, room)):
            path = f"{package}/{name.replace('.', '/')}"
            assert re.search(rf"\[`{name.replace('.', '/')}`\]\(\.\./{path}(\.py)?\)", TEXT), name


def test_every_name_on_the_page_is_in_its_file() -> None:
    links = LINK.findall(TEXT)
    wrong = []
    for name, target in links:
        path = ROOT / target
        is_file_name = (
            target.rstrip("/").removesuffix(".py").endswith(name.rstrip("/").removesuffix(".py"))
        )
        if not path.exists() or not (is_file_name or name in definitions(path)):
            wrong.append((name, target))

    assert len(links) > len(JOURNEYS)
    assert wrong == []


@pytest.mark.parametrize("journey", JOURNEYS)
def test_the_steps_are_on_the_way(journey: str, journeys: Journeys) -> None:
    traveled: Journey = getattr(journeys, journey)

    missing = [
        (step, traveled.ran(step.path, step.function))
        for step in steps(journey)
        if step.thread not in traveled.ran(step.path, step.function)
    ]

    assert len(steps(journey)) >= LEAST_STEPS
    assert missing == []


def test_one_small_update_passes_few_rooms(journeys: Journeys) -> None:
    assert len(journeys.update.rooms("qflare_server")) <= MOST_ROOMS


def test_no_room_that_an_update_passes_is_left_out(journeys: Journeys) -> None:
    named = {path for _, path in LINK.findall(section(JOURNEYS["update"]))}
    rooms = {
        path.split("/")[1].removesuffix(".py")
        for path in named
        if path.startswith("qflare_server/")
    }

    passed = set(journeys.update.rooms("qflare_server"))

    assert passed - {"context", "errors"} <= rooms <= passed


@pytest.mark.parametrize("word", ["verifies", "writes", "folds", "publishes"])
def test_a_fresh_reader_finds_it_in_four_clicks(word: str) -> None:
    readme = (ROOT / "README.md").read_text()
    found = [step for step in steps("update") if f"**{word}**" in step.text]

    assert "](docs/architecture.md)" in readme
    assert len(found) == 1
    assert (ROOT / found[0].path).is_file()


def test_every_thread_is_listed() -> None:
    listed = {name for row in rows("Threads") for name in re.findall(r"`([^`]+)`", row[0])}
    named = {
        name
        for path in (ROOT / "qflare_server").rglob("*.py")
        for name in thread_names(ast.parse(path.read_text()))
    }

    assert listed == named
