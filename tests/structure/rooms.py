"""Rooms of a package: its subpackages and modules, their layers, and the imports between them.

Layers come from the import contracts of `setup.cfg`, imports from grimp, sentences from docstrings. Imports under
`TYPE_CHECKING` do not count, as in the contracts.
"""

import ast
import configparser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grimp

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("qflare_simulation", "qflare_server", "qflare_client", "qflare_helper", "qflare")
CONTRACT_PREFIX: Final = "importlinter:contract:"

Arrow = tuple[str, str]


@dataclass(frozen=True)
class Structure:
    """The rooms of one package.

    Attributes:
        package: Name of the package.
        layers: Names of the rooms on each layer, the top layer first.
        arrows: Pairs of rooms of which the first imports the second.
        module_count: Modules in all rooms, packages' own `__init__` modules included.
    """

    package: str
    layers: tuple[tuple[str, ...], ...]
    arrows: frozenset[Arrow]
    module_count: int

    @property
    def rooms(self) -> tuple[str, ...]:
        """All rooms, by layer from the top."""
        return tuple(room for layer in self.layers for room in layer)

    @property
    def floors(self) -> int:
        """Rooms on the longest chain of imports."""
        return longest_chain(self.rooms, self.arrows)

    def imports_of(self, room: str) -> list[str]:
        """Return the rooms that a room imports, by layer from the top."""
        return [other for other in self.rooms if (room, other) in self.arrows]


def read_structure(package: str, root: Path = ROOT) -> Structure:
    """Read the structure of a package of this repository.

    Raises:
        KeyError: `setup.cfg` has no layers for the package.
    """
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    layers = declared_layers(root)[package]
    rooms = {room for layer in layers for room in layer}
    arrows = {
        (room_of(module, package), room_of(imported, package))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return Structure(
        package=package,
        layers=layers,
        arrows=frozenset(
            (room, other)
            for room, other in arrows
            if room != other and room in rooms and other in rooms
        ),
        module_count=sum(room_of(module, package) in rooms for module in graph.modules),
    )


def room_of(module: str, package: str) -> str:
    """Return the room of a module by its dotted name; empty for the package itself."""
    return module.removeprefix(package).lstrip(".").split(".")[0]


def declared_layers(root: Path = ROOT) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """Return the layers that the import contracts declare, by the package that they are about."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / "setup.cfg")
    sections = [config[name] for name in config.sections() if name.startswith(CONTRACT_PREFIX)]
    return {
        section["containers"].strip(): tuple(
            tuple(name.strip() for name in line.split("|"))
            for line in section["layers"].strip().splitlines()
        )
        for section in sections
        if section["type"] == "layers"
    }


def longest_chain(rooms: tuple[str, ...], arrows: frozenset[Arrow]) -> int:
    """Return the number of rooms on the longest chain of imports.

    Raises:
        RecursionError: The rooms import each other in a circle.
    """
    known: dict[str, int] = {}

    def depth(room: str) -> int:
        if room not in known:
            below = [other for importer, other in arrows if importer == room]
            known[room] = 1 + max(map(depth, below), default=0)
        return known[room]

    return max(map(depth, rooms))


def direct_arrows(structure: Structure) -> list[Arrow]:
    """Return the arrows that no chain of other arrows implies (the transitive reduction), from the top."""
    below = {room: reachable(room, structure.arrows) for room in structure.rooms}
    return [
        (room, other)
        for room in structure.rooms
        for other in structure.imports_of(room)
        if not any(other in below[between] for between in structure.imports_of(room))
    ]


def reachable(room: str, arrows: frozenset[Arrow]) -> set[str]:
    """Return the rooms that a room imports directly or through others."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        current = waiting.pop()
        new = {other for importer, other in arrows if importer == current} - found
        found |= new
        waiting += new
    return found


def room_path(package: str, room: str, root: Path = ROOT) -> Path:
    """Return the folder of a room, or its file where it is one module."""
    folder = root.joinpath(package, *room.split("."))
    return folder if folder.is_dir() else folder.with_suffix(".py")


def subpackages(package: str, room: str, root: Path = ROOT) -> Iterator[str]:
    """Yield the packages inside a room, sorted, with the room's name before a dot."""
    folder = room_path(package, room, root)
    if folder.is_dir():
        for path in sorted(folder.glob("*/__init__.py")):
            yield f"{room}.{path.parent.name}"
            yield from subpackages(package, f"{room}.{path.parent.name}", root)


def sentence_of(package: str, room: str, root: Path = ROOT) -> str:
    """Return the first line of the docstring of a room.

    Raises:
        ValueError: It has none.
    """
    path = room_path(package, room, root)
    path = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise ValueError(f"{path}: no docstring")
    return docstring.splitlines()[0]
