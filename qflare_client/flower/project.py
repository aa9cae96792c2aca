"""The folder of a Flower app: its pyproject.toml names the ClientApp and holds the run configuration.

Invariants: an override of the run configuration names a key that the app has, as `flwr run --run-config` wants it, so
that a misspelled one is refused. `FlowerProject.ignored` names what does not run on a device.
"""

import importlib
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from qflare_client.errors import InvalidArgumentError
from qflare_client.flower.library import client_app_class

UserConfig: TypeAlias = dict[str, bool | int | float | str]
"""Values by key, as of `Context.run_config` and `Context.node_config`."""

_FILE: Final = "pyproject.toml"


@dataclass(frozen=True)
class FlowerProject:
    """What the pyproject.toml of an app says."""

    folder: Path
    """Folder of the app."""

    reference: str
    """The ClientApp, as module:attribute."""

    run_config: UserConfig
    """The table `tool.flwr.app.config`, with keys of nested tables joined by a dot."""

    ignored: tuple[str, ...]
    """One sentence for each part of the app that does not run on a device."""

    def load(self) -> Any:
        """Import the ClientApp; the folder is put on the module path.

        Raises:
            MissingFlowerError: flwr is not installed.
            InvalidArgumentError: The reference names no ClientApp.
            Exception: Whatever importing the app raises.
        """
        kind = client_app_class()
        folder = str(self.folder.resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module_name, _, attribute = self.reference.partition(":")
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, kind):
            got = type(found).__name__
            raise InvalidArgumentError(
                f"{self.reference}: got {got}, want a flwr.clientapp.ClientApp"
            )
        return found


def read_project(folder: Path) -> FlowerProject:
    """Read the pyproject.toml of an app.

    Raises:
        InvalidArgumentError: It does not describe a Flower app with a ClientApp.
        OSError: It cannot be read.
    """
    path = folder / _FILE
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: {error}") from error
    app = _table(path, document, "tool", "flwr", "app")
    components = _table(path, app, "components")
    reference = components.get("clientapp", "")
    if not isinstance(reference, str) or not all(reference.partition(":")):
        raise InvalidArgumentError(
            f"{path}: tool.flwr.app.components.clientapp: want module:attribute"
        )
    return FlowerProject(
        folder,
        reference,
        user_config("tool.flwr.app.config", app.get("config", {})),
        _ignored(components),
    )


def user_config(what: str, values: object) -> UserConfig:
    """Return a configuration with keys of nested tables joined by a dot, as Flower hands it to apps.

    Raises:
        InvalidArgumentError: A value is no bool, int, float or str.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f"{what}: got {type(values).__name__}, want a mapping")
    flat: UserConfig = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            nested = user_config(f"{what}.{key}", value)
            flat |= {f"{key}.{inner}": entry for inner, entry in nested.items()}
        elif isinstance(value, bool | int | float | str):
            flat[str(key)] = value
        else:
            got = type(value).__name__
            raise InvalidArgumentError(f"{what}.{key}: got {got}, want a bool, int, float or str")
    return flat


def overridden(run_config: UserConfig, overrides: Mapping[str, Any]) -> UserConfig:
    """Return the run configuration of an app with overrides.

    Raises:
        InvalidArgumentError: An override names a key that the app does not have, or has a value of another kind.
    """
    given = user_config("run_config", overrides)
    for key in given:
        if key not in run_config:
            known = ", ".join(sorted(run_config)) or "none"
            raise InvalidArgumentError(f"run_config: the app has no {key!r}, it has: {known}")
    return {**run_config, **given}


def _table(path: Path, document: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        document = document.get(name, {})
        if not isinstance(document, Mapping):
            raise InvalidArgumentError(f"{path}: {name}: want a table")
    if not document:
        raise InvalidArgumentError(
            f"{path}: no table {'.'.join(names)}: it describes no Flower app"
        )
    return document


def _ignored(components: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{name} {reference} does not run here: {_REPLACED.get(name, 'only the ClientApp does')}"
        for name, reference in sorted(components.items())
        if name != "clientapp"
    )


_REPLACED: Final = {
    "serverapp": "the training session of the coordinator takes its place, with its strategy and its rounds"
}
