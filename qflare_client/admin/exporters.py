"""Exports version metrics to TensorBoard event files or an MLflow run.

The step is the version and the time is its publication time, so exports are repeatable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from qflare_client.admin.extras import require

MLFLOW_BATCH: Final = 500  # below the tracking API's limit of 1,000 metrics per call


def to_tensorboard(folder: Path, rows: Sequence[Any]) -> None:
    """Write event files.

    Args:
        folder: Created if it does not exist.
        rows: VersionMetrics, oldest first.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """
    writer = require("tensorboardX", "tensorboard").SummaryWriter(str(folder))
    try:
        for row in rows:
            at = row.create_time.ToNanoseconds() / 1e9
            for name, value in _values(row).items():
                writer.add_scalar(name, value, row.version, walltime=at)
    finally:
        writer.close()


def to_mlflow(uri: str, experiment: str, session: Any, rows: Sequence[Any]) -> str:
    """Write a run and return its id.

    Args:
        uri: Tracking server, or folder.
        experiment: Name; created if it does not exist.
        session: TrainingSession; its configuration becomes the parameters.
        rows: VersionMetrics, oldest first.

    Raises:
        MissingExtraError: mlflow-skinny is not installed.
    """
    mlflow = require("mlflow", "mlflow")
    client = mlflow.MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    tags = {"qflare.training_session_id": session.training_session_id}
    run_id = str(client.create_run(experiment_id, run_name=session.name, tags=tags).info.run_id)
    entities = mlflow.entities
    config = json_format.MessageToDict(session.config)
    parameters = [entities.Param(name, str(value)[:6000]) for name, value in _flat("", config)]
    client.log_batch(run_id, params=parameters[:100])
    measured = [
        entities.Metric(name, value, row.create_time.ToMilliseconds(), row.version)
        for row in rows
        for name, value in _values(row).items()
    ]
    for start in range(0, len(measured), MLFLOW_BATCH):
        client.log_batch(run_id, metrics=measured[start : start + MLFLOW_BATCH])
    client.set_terminated(run_id)
    return run_id


def _values(row: Any) -> dict[str, float]:
    """Return all metrics of a version, under names that both tools accept."""
    values = dict(row.metrics)
    values["devices"] = float(row.participant_count)
    values["examples"] = float(row.example_count)
    if row.HasField("epsilon"):
        values["epsilon"] = row.epsilon
    for group, measured in row.group_metrics.items():
        values |= {f"{name}/{group}": value for name, value in measured.values.items()}
    return values


def _flat(prefix: str, config: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return nested settings as a flat mapping with dotted names."""
    flat: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            flat.extend(_flat(f"{prefix}{name}.", value))
        else:
            flat.append((prefix + name, value))
    return flat
