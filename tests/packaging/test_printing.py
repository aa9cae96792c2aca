"""Every program prints through `qflare.terminal`, which prints nothing that a terminal obeys."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAWING = {
    "qflare/terminal.py": "it is the rule",
    "qflare_client/terminal.py": "draws a progress bar over itself",
    "qflare_client/admin/live.py": "draws a line over itself",
    "qflare_server/cli/terminal.py": "draws a progress bar over itself",
    "qflare_simulation/terminal.py": "draws a line over itself",
}
"""Modules that write to a terminal themselves, and why; each passes what it draws through `printable`."""
TEMPLATES = ("qflare_client/project/template/", "qflare_simulation/template/")
MODULES = sorted(
    path
    for package in (
        "qflare",
        "qflare_client",
        "qflare_helper",
        "qflare_server",
        "qflare_simulation",
    )
    for path in (ROOT / package).rglob("*.py")
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
)
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def writes(tree: ast.Module, source: list[str]) -> Iterator[str]:
    """Yield the lines that print or take a stream of the process to write to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found = getattr(node.func, "id", "") == "print"
        elif isinstance(node, ast.Attribute):
            found = getattr(node.value, "id", "") == "sys" and node.attr in STREAMS
        else:
            continue
        if found:
            yield source[node.lineno - 1].strip()


ALLOWED = (
    ".isatty()",
    ".fileno()",
    "# noqa: T201  # a script has tabs",
    "Screen(sys.stdout)",
    "self.print_usage(sys.stderr)",
)


def test_modules_print_through_one_rule() -> None:
    found: dict[str, list[str]] = {}
    for path in MODULES:
        name = str(path.relative_to(ROOT))
        if name in DRAWING or name.startswith(TEMPLATES):
            continue
        text = path.read_text()
        lines = [
            line
            for line in writes(ast.parse(text), text.splitlines())
            if not any(allowed in line for allowed in ALLOWED)
        ]
        if lines:
            found[name] = lines

    assert found == {}, "print by qflare.terminal.say or complain"


@pytest.mark.parametrize("name", [name for name in DRAWING if name != "qflare/terminal.py"])
def test_a_module_that_draws_asks_for_what_is_printable(name: str) -> None:
    assert "printable(" in (ROOT / name).read_text()


def test_programs_log_through_one_rule() -> None:
    for path in MODULES:
        text = path.read_text()
        if "logging.basicConfig(" in text:
            assert "LogFormatter(" in text, path
        assert "logging.Formatter(" not in text.replace("(logging.Formatter)", ""), path
