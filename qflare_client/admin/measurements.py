"""Commands on the metrics of versions: show, plot, export."""

import argparse
import math
from pathlib import Path
from typing import Any

from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.arguments import add_command, add_limit, add_session, add_topic, show_list
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, moment, note, optional, version_metrics

METRICS: list[Column] = [
    ("version", lambda row: row.version),
    ("round", lambda row: row.round_number or None),
    ("published", lambda row: moment(row, "create_time")),
    ("devices", lambda row: row.participant_count),
    ("examples", lambda row: row.example_count),
    ("epsilon", lambda row: optional(row, "epsilon")),
    ("released", lambda row: row.released),
    ("metrics", lambda row: version_metrics(row.metrics)),
]


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "metrics", "metrics of versions")
    shown = add_command(
        actions, "show", run_show, "show metrics, oldest first", "metrics show digits"
    )
    add_session(shown)
    add_limit(shown)
    plot = add_command(
        actions,
        "plot",
        run_plot,
        "save a plot of metrics as PNG or SVG (needs qflare[plot])",
        "metrics plot digits curve.svg --metric accuracy --metric loss",
    )
    add_session(plot)
    plot.add_argument("file", type=Path, help="ends in .png or .svg")
    plot.add_argument("--metric", action="append", default=[], help="default: all; repeatable")
    export = add_command(
        actions,
        "export",
        run_export,
        "export metrics to TensorBoard or MLflow (needs qflare[tensorboard] or qflare[mlflow])",
        "metrics export digits --tensorboard runs/digits",
    )
    add_session(export)
    target = export.add_mutually_exclusive_group(required=True)
    target.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for event files")
    target.add_argument("--mlflow", metavar="URI", help="tracking server or folder")
    export.add_argument("--experiment", default="qflare", help="MLflow experiment (qflare)")


def history(admin: Admin, session_id: str) -> list[Any]:
    """Return the metrics of every version, oldest first."""
    request = pb.ListMetricsRequest(training_session_id=session_id)
    return list(admin.collect("ListMetrics", request, "metrics", 0).metrics)


def series(rows: list[Any], wanted: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Return versions and values of each metric, finite ones only."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in sorted(row.metrics.items()):
            if math.isfinite(value) and (not wanted or name in wanted):
                found.setdefault(name, []).append((row.version, value))
    return found


def run_show(admin: Admin, options: argparse.Namespace) -> None:
    """Show metrics."""
    request = pb.ListMetricsRequest(training_session_id=options.session)
    answer = admin.collect("ListMetrics", request, "metrics", options.limit)
    show_list(options, answer, "metrics", METRICS)


def run_plot(admin: Admin, options: argparse.Namespace) -> None:
    """Save a plot of metrics."""
    from qflare_client.admin.plots import save  # noqa: PLC0415  # an extra

    session = admin.call(
        "GetTrainingSession", pb.GetTrainingSessionRequest(training_session_id=options.session)
    ).training_session
    save(options.file, session.name, series(history(admin, options.session), options.metric))
    note(f"wrote {options.file}")


def run_export(admin: Admin, options: argparse.Namespace) -> None:
    """Export metrics."""
    from qflare_client.admin import exporters  # noqa: PLC0415  # extras

    session = admin.call(
        "GetTrainingSession", pb.GetTrainingSessionRequest(training_session_id=options.session)
    ).training_session
    rows = history(admin, options.session)
    if options.tensorboard is not None:
        exporters.to_tensorboard(options.tensorboard, rows)
        note(f"wrote {len(rows)} versions to {options.tensorboard}")
    else:
        run_id = exporters.to_mlflow(options.mlflow, options.experiment, session, rows)
        note(f"wrote {len(rows)} versions to MLflow run {run_id}")
