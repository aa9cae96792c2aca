"""The result of a simulation: tables, curves, exports and the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from qflare.analytics.results import Result
from qflare.tensors import Manifest, chunks
from qflare.tensors.safetensors_files import export_safetensors, with_facts
from qflare_client.admin import plots
from qflare_client.admin.analytics import as_lines
from qflare_client.admin.extras import MissingExtraError, require
from qflare_client.errors import InvalidRequestError
from qflare_server.storage.tables import RoundState
from qflare_simulation import tables as tabular
from qflare_simulation.config import SimulationConfig
from qflare_simulation.errors import SimulationError

SHOWN: Final = ("round", "state", "selected", "accepted", "late", "failed", "rejected")


Tables: TypeAlias = Mapping[str, Sequence[tabular.Row]]
"""Rows by table."""


@dataclass(frozen=True)
class Best:
    """The best version of a training session by its objective.

    Attributes:
        version: Its number.
        metric: Metric of the objective.
        value: Its value.
        data: What it was measured on: held out (by devices), test data, or training data only.
    """

    version: int
    metric: str
    value: float
    data: str


@dataclass(frozen=True)
class History:
    """What a simulated training session did, and the model that it made.

    Attributes:
        config: The configuration that was simulated.
        tables: Rows by table; `qflare_simulation.COLUMNS` documents the columns.
        model: Tensors of the last version.
        version: Number of the last version.
        state: completed, failed or cancelled.
        reason: Why it ended, if there is a reason.
        virtual_s: Virtual seconds from start to end.
        refusals: Reasons of refused updates, with how often.
        counts: Of each round: devices asked, lost, late, failed, and updates refused.
        session_id: Id of the training session, for `replay`.
        folder: Folder of the coordinator's database; None if it was temporary.
        best: The best version by the session's objective; None if nothing was measured.
        local_epsilon: Largest epsilon that a device has spent by local privacy; None without.
        result: Table of a query of federated analytics; None for a model, and without enough answers.
    """

    config: SimulationConfig = field(repr=False)
    tables: Tables = field(repr=False)
    model: Mapping[str, NDArray[Any]] = field(repr=False)
    version: int
    state: str
    reason: str
    virtual_s: float
    refusals: Mapping[str, int]
    counts: Mapping[int, Mapping[str, int]] = field(repr=False)
    session_id: str
    folder: Path | None = None
    best: Best | None = None
    local_epsilon: float | None = None
    result: Result | None = None

    @property
    def name(self) -> str:
        """Name of the training session."""
        return self.config.name

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Return version and value of each metric of versions.

        Those on test data are named `test_...`, means of the devices' trainings `train_...`, and means of what devices
        measured on held-out data have plain names.
        """
        series: dict[str, list[tuple[int, float]]] = {}
        for row in self.tables["metrics"]:
            if row["source"] in {"version", "test"}:
                name = f"test_{row['name']}" if row["source"] == "test" else row["name"]
                series.setdefault(name, []).append((row["version"], row["value"]))
        return series

    def final(self) -> dict[str, float]:
        """Return the last value of each metric of versions."""
        return {name: values[-1][1] for name, values in self.metrics().items()}

    def history(self, table: str = "rounds") -> list[tabular.Row]:
        """Return the rows of a table: rounds, versions, updates, metrics, timings or selections.

        Raises:
            SimulationError: There is no such table.
        """
        if table not in self.tables:
            raise SimulationError(f"table: got {table!r}, want one of {', '.join(self.tables)}")
        return list(self.tables[table])

    def to_arrow(self, table: str = "rounds") -> Any:
        """Return a table as a pyarrow.Table.

        Raises:
            SimulationError: There is no such table, or pyarrow is not installed.
        """
        return tabular.to_arrow(table, self.history(table))

    def to_pandas(self, table: str = "rounds") -> Any:
        """Return a table as a pandas.DataFrame.

        Raises:
            SimulationError: There is no such table, or pandas is not installed.
        """
        rows = self.history(table)
        return _needed("pandas", "simulation").DataFrame(rows, columns=list(tabular.COLUMNS[table]))

    def export(self, folder: str | Path, form: str = "csv") -> list[Path]:
        """Write every table to a folder as csv or parquet and return the files.

        Raises:
            SimulationError: The form is another, or pyarrow, which Parquet needs, is not installed.
        """
        if form not in {"csv", "parquet"}:
            raise SimulationError(f"form: got {form!r}, want csv or parquet")
        return tabular.write(Path(folder), self.tables, form)

    def save_model(self, path: str | Path) -> None:
        """Write the last version to a safetensors file."""
        arrays = dict(self.model)
        manifest = Manifest.from_arrays(arrays)
        facts = with_facts({}, training_session_id=self.session_id, version=self.version)
        export_safetensors(Path(path), manifest, chunks(arrays, manifest), facts)

    def plot(self, path: str | Path) -> None:
        """Save the curves of the metrics of versions as PNG or SVG.

        Raises:
            SimulationError: Another extension, no metric, or matplotlib is not installed.
        """
        try:
            plots.save(Path(path), self.name, self.metrics())
        except (InvalidRequestError, MissingExtraError) as error:
            raise SimulationError(str(error)) from error

    def tensorboard(self, folder: str | Path) -> None:
        """Write the metrics of versions as event files for TensorBoard.

        Raises:
            SimulationError: tensorboardX is not installed.
        """
        writer = _needed("tensorboardX", "tensorboard").SummaryWriter(str(folder))
        try:
            for name, values in self.metrics().items():
                for version, value in values:
                    writer.add_scalar(name, value, version, walltime=float(version))
        finally:
            writer.close()

    def mlflow(self, uri: str | Path, experiment: str = "qflare") -> str:
        """Write the metrics of versions as a run of MLflow and return its id.

        Args:
            uri: Tracking server, or folder.
            experiment: Created if it does not exist.

        Raises:
            SimulationError: mlflow-skinny is not installed, or the server refuses the run.
        """
        mlflow = _needed("mlflow", "mlflow")
        try:
            return self._logged(mlflow, uri, experiment)
        except mlflow.exceptions.MlflowException as error:
            raise SimulationError(f"mlflow: {error}") from error

    def _logged(self, mlflow: Any, uri: str | Path, experiment: str) -> str:
        client = mlflow.MlflowClient(tracking_uri=str(uri))
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
        run_id = str(client.create_run(experiment_id, run_name=self.name).info.run_id)
        settings = self.config.training.strategy.name or "fedavg", self.config.devices
        for key, value in zip(("strategy", "devices"), settings, strict=True):
            client.log_param(run_id, key, value)
        for name, values in self.metrics().items():
            for version, value in values:
                client.log_metric(run_id, name, value, timestamp=version, step=version)
        client.set_terminated(run_id)
        return run_id

    def table(self) -> str:
        """Return the rounds and their test metrics as text."""
        measured: dict[int, dict[str, float]] = {}
        for row in self.tables["metrics"]:
            if row["source"] == "test":
                measured.setdefault(row["version"], {})[row["name"]] = row["value"]
        names = sorted({name for values in measured.values() for name in values})
        head = [*SHOWN, *names]
        lines = [head]
        for row in self.tables["rounds"]:
            values = measured.get(row["version"], {})
            shown = [f"{values[name]:.4f}" if name in values else "" for name in names]
            lines.append([str(row[column]) for column in SHOWN] + shown)
        widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
        return "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in lines
        )

    def __str__(self) -> str:
        """Return the table, why rounds failed, and a line on the end."""
        ended = f"{self.state} at version {self.version} after {self.virtual_s:.0f} virtual seconds"
        lines = [self.table(), *self._failures()]
        lines.append(f"{ended}{': ' + self.reason if self.reason else ''}")
        if self.best is not None:
            shown = f"{self.best.metric} {self.best.value:.4f} ({self.best.data})"
            lines.append(f"best version {self.best.version}: {shown}")
        if self.local_epsilon is not None:
            lines.append(f"local privacy: epsilon {self.local_epsilon:.4g} of a device")
        if self.result is not None:
            lines += as_lines(self.result)
            lines.append(f"the noise has a deviation of {self.result.error:.4g}")
        return "\n".join(lines)

    def _failures(self) -> list[str]:
        """Return a line for each reason for which rounds failed."""
        found: dict[str, list[str]] = {}
        for row in self.tables["rounds"]:
            if row["state"] == RoundState.FAILED.value:
                found.setdefault(row["reason"], []).append(str(row["round"]))
        return [
            f"failed {'round' if len(numbers) == 1 else 'rounds'} {', '.join(numbers)}: {reason}"
            for reason, numbers in found.items()
        ]


def compare(histories: Sequence[History], path: str | Path, metric: str = "test_accuracy") -> None:
    """Save the curves of one metric of several simulations in one picture, PNG or SVG.

    Raises:
        SimulationError: None has the metric, two have one name, or matplotlib is not installed.
    """
    series = {item.name: item.metrics()[metric] for item in histories if metric in item.metrics()}
    if len({item.name for item in histories}) < len(histories):
        raise SimulationError("compare: two simulations have the same simulation.name")
    if not series:
        known = sorted({name for item in histories for name in item.metrics()})
        raise SimulationError(f"metric: got {metric!r}, want one of {', '.join(known) or 'none'}")
    path = Path(path)
    if path.suffix not in plots.FORMATS:
        raise SimulationError(f"{path}: want .png or .svg")
    figure = _needed("matplotlib.figure", "plot").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        axes.plot(*zip(*values, strict=True), marker=".", label=name)
    axes.set_xlabel("version")
    axes.set_ylabel(metric)
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _needed(module: str, extra: str) -> Any:
    try:
        return require(module, extra)
    except MissingExtraError as error:
        raise SimulationError(str(error)) from error


__all__ = ["Best", "History", "Tables", "compare"]
