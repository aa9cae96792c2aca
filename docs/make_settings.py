"""Generates the settings table of `operations.md` from the fields of `ServerConfig` and their docstrings.

    python docs/make_settings.py

A test fails if the table is out of date.
"""

import ast
import inspect
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Final

from qflare_server.config import ENVIRONMENT_PREFIX, ServerConfig

PAGE: Final = Path(__file__).parent / "operations.md"
BEGIN: Final = "<!-- begin: settings -->\n"
END: Final = "<!-- end: settings -->\n"


def table() -> str:
    """Return the settings as a Markdown table, in field order."""
    texts = _texts()
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for item in fields(ServerConfig):
        variable = f"{ENVIRONMENT_PREFIX}{item.name.upper()}"
        lines.append(f"| `{variable}` | {_default(item)} | {texts[item.name]} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the text of the page with the table regenerated."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _texts() -> dict[str, str]:
    """Return the docstring of each field, joined into one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(ServerConfig))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            texts[field.target.id] = " ".join(str(below.value.value).split()).replace("|", "\\|")
    return texts


def _default(item: "Field[Any]") -> str:
    value = item.default
    assert value is not MISSING
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.0f}`" if isinstance(value, float) and value.is_integer() else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
