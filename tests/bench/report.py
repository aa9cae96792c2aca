"""The table as it is printed and as it is kept in docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.figures import Figure, percent, table

HEADS = ("what", "measured", "ceiling, same run", "share", "goal", "reached", "load", "stolen")
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"


def render(figures: Sequence[Figure]) -> str:
    """Return figures as one table."""
    rows = [
        (
            figure.what,
            figure.measured,
            figure.ceiling,
            figure.share,
            figure.goal,
            figure.verdict,
            f"{figure.load:.1f}",
            percent(figure.stolen),
        )
        for figure in figures
    ]
    return table(rows, HEADS)


def facts(machine: Mapping[str, str]) -> str:
    """Return the machine as a list."""
    return "\n".join(f"- {name}: {text}" for name, text in machine.items())


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a section, and nothing else; a file that does not exist is made.

    Raises:
        ValueError: The file has no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    written = path.read_text() if path.exists() else f"{begin}{end}\n"
    before, found, rest = written.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} has no section {name}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def problem_of(path: Path, name: str) -> str:
    """Return why a section cannot be written to a file, empty text if it can: told before an hour of measuring."""
    try:
        if path.exists():
            text = path.read_text()
            marks = BEGIN.format(name) in text and END.format(name) in text
            return "" if marks else f"{path} has no section {name}; name that page or a new file"
        path.touch()
        path.unlink()
    except (OSError, UnicodeDecodeError) as error:
        return f"{path}: {error}"
    return ""
