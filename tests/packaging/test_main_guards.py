"""Device programs that users copy can be imported: worker processes that are spawned import them again."""

import ast
import re
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import ROOT

ACTING: Final = {"Client", "enroll", "run", "main"}
BLOCK: Final = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def programs() -> list[tuple[str, str]]:
    """Return every Python program that imports the SDK, with the place where it stands."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    template = ROOT / "qflare_client/project/template"
    found = [
        (f"{page.name}:{number}", block)
        for page in [*pages, template / "README.md"]
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    ]
    files = [*sorted((ROOT / "examples").rglob("*.py")), template / "device.py"]
    found += [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in files]
    package = ast.get_docstring(ast.parse(Path(ROOT / "qflare_client/__init__.py").read_text()))
    assert package is not None
    indented = re.search(r"^    from pathlib.*?(?=^\S)", package, re.DOTALL | re.MULTILINE)
    assert indented is not None
    found.append(
        ("qflare_client/__init__.py", re.sub(r"^    ", "", indented[0], flags=re.MULTILINE))
    )
    return [(place, text) for place, text in found if "qflare_client" in text]


def acts_when_imported(text: str) -> set[str]:
    """Return the functions that a program calls outside of functions and of its main guard."""
    called: set[str] = set()
    for statement in ast.parse(text).body:
        is_guard = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
        if is_guard or isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        called |= {
            node.func.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
    return called & ACTING


@pytest.mark.parametrize(("place", "text"), programs(), ids=[place for place, _ in programs()])
def test_a_program_does_nothing_when_it_is_imported(place: str, text: str) -> None:
    assert acts_when_imported(text) == set(), place


def test_the_programs_are_found() -> None:
    assert len(programs()) > 8
