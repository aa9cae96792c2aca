"""Configuration of a simulation: the table `simulation` of a file, beside the settings of the training session.

    total_rounds = 10
    rounds = { device_count = 20 }

    [simulation]
    devices = 100
    partition = "dirichlet"
    alpha = 0.3

The rest of the file is what `qflare-admin session create --config FILE` takes, which skips the table: what was
simulated starts for real with the same file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from qflare.training_settings import (
    SIMULATION,
    SettingError,
    from_mapping,
    parse_file,
    read_file,
)
from qflare.v1 import training_pb2
from qflare_client.privacy import LocalPrivacy
from qflare_simulation.errors import SimulationError
from qflare_simulation.kinds import DeviceKind, checked_kinds, dealt

PARTITIONS: Final = ("iid", "dirichlet", "shards", "column")
MAX_DEVICES: Final = 1_000_000
_PATHS: Final = ("train", "model", "evaluate", "data")


@dataclass(frozen=True)
class SimulationConfig:
    """Settings of a simulation.

    Raises:
        SimulationError: A setting is out of its range.
    """

    training: training_pb2.TrainingConfig = field(default_factory=training_pb2.TrainingConfig)
    """Settings of the training session, as of a real one."""

    name: str = "simulation"
    """Name of the training session and of its curve in pictures."""

    devices: int = 100
    """Number of virtual devices, 1 or more."""

    seed: int = 1
    """Seed of partitions, selection, durations, drop-outs, noise and training, 0 or more."""

    workers: int = 0
    """Processes that train; 0 means one for each processor, -1 trains in this process."""

    ray: str = ""
    """Address of a Ray cluster that trains: `auto`, host:port, or `local`; empty trains here, without Ray."""

    duration_s: float = 60.0
    """Median time from task to update of a device, virtual seconds."""

    duration_spread: float = 0.0
    """Standard deviation of the logarithm of the time from task to update."""

    straggler_share: float = 0.0
    """Share of the devices that are always slow, 0 to 1."""

    straggler_factor: float = 10.0
    """How many times slower those are, 1 or more."""

    drop_out: float = 0.0
    """Probability that a device which got a task never answers, 0 to 1."""

    failure_share: float = 0.5
    """Share of failed trainings in a round above which the simulation stops; 1 never stops it."""

    evaluate_every: int = 1
    """Versions between two evaluations on test data; 0 evaluates none."""

    held_out: float = 0.0
    """Share of each device's examples that it does not train on, and measures versions on, 0 to below 1."""

    local_privacy: LocalPrivacy | None = None
    """Local differential privacy of every device, a table with the fields of `qflare_client.LocalPrivacy`."""

    kinds: tuple[DeviceKind, ...] = ()
    """Kinds of devices, tables with the fields of `DeviceKind`; without any, every device qualifies."""

    data: str = "digits"
    """Ready data set, or `PATH:FUNCTION` that returns one or a sequence with the data of each device."""

    partition: str = "iid"
    """How a data set is divided: iid, dirichlet, shards or column."""

    alpha: float = 0.5
    """Concentration of the Dirichlet partition; the smaller, the more uneven."""

    shards: int = 2
    """Shards of sorted examples that each device gets, 1 or more."""

    column: str = ""
    """Column of which each device, in turn, gets one value."""

    train: str = ""
    """`PATH:FUNCTION` that trains; empty means the data set's own."""

    evaluate: str = ""
    """`PATH:FUNCTION` that evaluates; empty means the data set's own."""

    analytics: Mapping[str, str] = field(default_factory=dict)
    """`PATH:FUNCTION` of each column that queries of federated analytics ask for."""

    model: str = ""
    """Initial model: a safetensors file or `PATH:FUNCTION`; empty means the data set's own."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        self._whole("devices", 1, MAX_DEVICES)
        self._whole("seed", 0, 2**32 - 1)
        self._whole("workers", -1, 1024)
        self._whole("evaluate_every", 0, 1_000_000)
        self._whole("shards", 1, 100_000)
        self._number("duration_s", 0.0, 1e9)
        self._number("duration_spread", 0.0, 10.0)
        self._number("straggler_factor", 1.0, 1e6)
        self._number("alpha", 1e-6, 1e6)
        for share in ("straggler_share", "drop_out", "failure_share"):
            self._number(share, 0.0, 1.0)
        self._number("held_out", 0.0, 0.99)
        object.__setattr__(self, "kinds", checked_kinds(self.kinds))
        object.__setattr__(self, "local_privacy", _privacy(self.local_privacy))
        _check_columns(self.analytics)
        if not isinstance(self.ray, str):
            raise SimulationError(
                f"simulation.ray: got {self.ray!r}, want the address of a cluster"
            )
        if self.ray and self.workers < 0:
            raise SimulationError("simulation.workers: got -1, want 0 or more with simulation.ray")
        if self.partition not in PARTITIONS:
            raise SimulationError(
                f"simulation.partition: got {self.partition!r}, want one of {', '.join(PARTITIONS)}"
            )

    def _whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise SimulationError(
                f"simulation.{name}: got {value!r}, want a whole number from {least} to {most}"
            )

    def _number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            raise SimulationError(
                f"simulation.{name}: got {value!r}, want a number from {least:g} to {most:g}"
            )

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a file, TOML or JSON. Paths in its table are relative to the file.

        Raises:
            SimulationError: It cannot be read, or a setting is unknown or out of range.
        """
        path = Path(path)
        training = training_pb2.TrainingConfig()
        try:
            read_file(path, training)
            table = parse_file(path).get(SIMULATION, {})
        except SettingError as error:
            raise SimulationError(f"{error}; want {error.remedy}") from error
        except OSError as error:
            raise SimulationError(f"{path}: {error.strerror}") from error
        found = cls._from_table(table, training)
        moved: dict[str, Any] = {
            name: _beside(path.parent, getattr(found, name)) for name in _PATHS
        }
        moved["analytics"] = {
            column: _beside(path.parent, text) for column, text in found.analytics.items()
        }
        return replace(found, name=table.get("name", path.stem), **moved)

    @classmethod
    def from_value(cls, value: "SimulationConfig | Mapping[str, Any] | str | Path | None") -> Self:
        """Return a configuration given as such, as a mapping, as the path of a file, or None for the defaults.

        A mapping has the settings of the training session by key, such as `{"rounds.quorum": 3}`, and those of the
        simulation under `simulation`.

        Raises:
            SimulationError: A setting is unknown or out of range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return cls.read(value)
        if value is not None and not isinstance(value, Mapping):
            got = type(value).__name__
            raise SimulationError(f"config: got {got}, want a path, a mapping or SimulationConfig")
        settings = dict(value or {})
        table = settings.pop(SIMULATION, {})
        try:
            training = from_mapping(settings)
        except SettingError as error:
            raise SimulationError(f"{error}; want {error.remedy}") from error
        return cls._from_table(table, training)

    @classmethod
    def _from_table(cls, table: object, training: training_pb2.TrainingConfig) -> Self:
        if not isinstance(table, Mapping):
            raise SimulationError(f"simulation: got {type(table).__name__}, want a table")
        known = {item.name for item in fields(cls)} - {"training"}
        unknown = sorted(set(table) - known)
        if unknown:
            raise SimulationError(
                f"there is no setting simulation.{unknown[0]}; want one of {', '.join(sorted(known))}"
            )
        return cls(training, **table)

    def with_devices(self, count: int) -> Self:
        """Return this configuration with another number of devices."""
        return replace(self, devices=count)

    def session_config(self) -> training_pb2.TrainingConfig:
        """Return the settings of the training session as it is simulated.

        The seed decides the selection. Without `kinds`, virtual devices stand for those that would qualify, so that
        groups, device types and capabilities are left out. So is sealing, which changes no value. Without a number of
        updates, a round needs a majority of the devices that are asked.
        """
        config = training_pb2.TrainingConfig()
        config.CopyFrom(self.training)
        config.selection.seed = config.selection.seed or self.seed + 1
        if not (
            config.rounds.quorum or config.rounds.device_count or config.selection.device_count
        ):
            share = config.selection.fraction or 1.0
            config.rounds.device_count = max(1, math.ceil(self.devices * share))
        if not self.kinds:
            config.ClearField("groups")
            config.selection.ClearField("device_types")
            config.selection.ClearField("capabilities")
        config.transfer.ClearField("sealed")
        return config

    def device_kinds(self) -> list[DeviceKind]:
        """Return the kind of each device, by index."""
        return dealt(self.kinds, self.devices, self.seed)


def _privacy(value: object) -> LocalPrivacy | None:
    if value is None or isinstance(value, LocalPrivacy):
        return value
    if not isinstance(value, Mapping):
        raise SimulationError(f"simulation.local_privacy: got {value!r}, want a table")
    try:
        return LocalPrivacy(**value)
    except (TypeError, ValueError) as error:
        raise SimulationError(f"simulation.local_privacy: {error}") from error


def _check_columns(value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise SimulationError(
            f"simulation.analytics: got {value!r}, want a table of columns with PATH:FUNCTION"
        )


def _beside(folder: Path, text: object) -> str:
    """Return a reference to a file as relative to a folder; other text is unchanged."""
    if not isinstance(text, str):
        raise SimulationError(f"simulation: got {text!r}, want text")
    file, colon, name = text.partition(":")
    if not file.endswith((".py", ".safetensors")):
        return text
    return f"{folder / file}{colon}{name}"
