"""Generates the tables of columns in `simulation.md` from `qflare_simulation.COLUMNS`.

    python -m docs.make_history

A test fails if the page is out of date.
"""

from pathlib import Path
from typing import Final

from qflare_simulation import COLUMNS

PAGE: Final = Path(__file__).parent / "simulation.md"
BEGIN: Final = "<!-- begin: columns of the history -->\n"
END: Final = "<!-- end: columns of the history -->\n"


def columns() -> str:
    """Return one Markdown table for each table of the history."""
    parts = []
    for table, meanings in COLUMNS.items():
        rows = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in meanings.items())
        parts.append(f"\n| column of `{table}` | meaning |\n|---|---|\n{rows}")
    return "".join(parts)


def page(text: str) -> str:
    """Return the page with current tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{columns()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
