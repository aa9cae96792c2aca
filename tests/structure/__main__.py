"""`python -m tests.structure`: print rooms, floors and imports of each package, and what one small update passes."""

import sys
import tempfile
from pathlib import Path

from tests.bench.figures import table
from tests.structure.journeys import Journey, travel
from tests.structure.rooms import PACKAGES, read_structure


def structure_table() -> str:
    """Return the figures of the packages as a Markdown table."""
    rows = []
    for package in PACKAGES:
        read = read_structure(package)
        figures = (read.module_count, len(read.rooms), len(read.layers), read.floors)
        rows.append((f"`{package}`", *map(str, figures), str(len(read.arrows))))
    heads = ("package", "modules", "rooms", "layers", "floors", "imports between rooms")
    return table(rows, heads)


def journey_table(journeys: dict[str, Journey]) -> str:
    """Return what each journey passes as a Markdown table: files, and the rooms that they are in."""
    rows = [
        (name, *(f"{len(way.files(package))} in {len(way.rooms(package))}" for package in PACKAGES))
        for name, way in journeys.items()
    ]
    return table(rows, ("files in rooms", *(f"`{package}`" for package in PACKAGES)))


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as folder:
        journeys = travel(Path(folder))
    named = {
        "one enrollment": journeys.enrollment,
        "one small update": journeys.update,
        "one download": journeys.download,
    }
    sys.stdout.write(f"{structure_table()}\n\n{journey_table(named)}\n")


if __name__ == "__main__":
    main()
