"""The history of a training session as tables: rounds, versions, updates, metrics, timings and selections.

The same tables come from a simulation and from the database of a real coordinator. `COLUMNS` documents every column.
Seconds are counted from the start of the training session.
"""

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from sqlalchemy.orm import Session

from qflare_server.storage.database import Database
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import history, training_sessions
from qflare_simulation.errors import SimulationError

Row: TypeAlias = dict[str, Any]

COLUMNS: Final[Mapping[str, Mapping[str, str]]] = {
    "rounds": {
        "round": "number of the round, from 1",
        "state": "open, closed, published, failed or cancelled",
        "reason": "why it failed or was extended; empty otherwise",
        "base_version": "version that its devices trained from",
        "version": "version that it made; empty if none",
        "quorum": "updates that it needed",
        "target": "updates that closed it before its deadline",
        "selected": "devices drawn for it; 0 if all could take part, -1 if none qualified",
        "accepted": "updates accepted",
        "rejected": "updates that its strategy left out",
        "late": "devices whose update came after it had closed",
        "failed": "devices that reported a failure",
        "examples": "examples of the accepted updates",
    },
    "versions": {
        "version": "number of the version; 0 is the first model",
        "round": "round that made it; 0 for the first model and for a rollback",
        "base_version": "version that it was made from; -1 for the first model",
        "devices": "updates that it was made from",
        "examples": "examples of those updates",
        "method": "aggregation rule",
        "epsilon": "privacy spent with it; empty without differential privacy",
        "delta": "delta of that guarantee",
        "released": "whether it was released",
        "size_bytes": "size of its payload",
        "digest": "Merkle root of its payload, 64 hex digits",
        "published_s": "when it was published",
    },
    "updates": {
        "round": "round that it counted in",
        "device": "id of the device",
        "base_version": "version that it was trained from",
        "sequence": "place in the order of acceptance, from 1",
        "state": "pending, aggregated or rejected",
        "reason": "why it was rejected; empty otherwise",
        "version": "version that it went into; empty if none",
        "score": "what the strategy judged it by; empty if it judges none",
        "examples": "examples that it was trained on",
        "size_bytes": "size of its payload",
        "digest": "Merkle root of its payload, 64 hex digits",
        "accepted_s": "when it was accepted",
        "aggregated_s": "when its version was published; empty if none",
    },
    "metrics": {
        "source": "update, evaluation (of a device), version (means of both) or test (a simulation's own)",
        "round": "round of the update, or that made the version",
        "version": "version that was measured, or that the update was trained from",
        "device": "id of the device; empty for versions",
        "name": "name of the metric",
        "value": "its value",
    },
    "timings": {
        "round": "number of the round",
        "opened_s": "when it opened",
        "deadline_s": "when it was to close at the latest",
        "first_update_s": "when its first update was accepted; empty if none",
        "median_update_s": "median of the times at which its updates were accepted",
        "last_update_s": "when its last update was accepted",
        "closed_s": "when it closed",
        "published_s": "when its version was published",
    },
    "selections": {
        "round": "number of the round",
        "device": "id of the device",
        "answer": "accepted, late, failed or none",
    },
}
"""Meaning of every column, by table."""


def read(
    database: Database,
    training_session_id: str,
    measured: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[str, list[Row]]:
    """Return every table of a training session.

    Args:
        database: Of the coordinator; only read.
        training_session_id: The training session.
        measured: Metrics by version that a simulation measured itself.

    Raises:
        SimulationError: There is no such training session.
    """
    with database.read() as session:
        owner = training_sessions.get_session(session, training_session_id)
        if owner is None:
            raise SimulationError(f"no training session {training_session_id[:64]!r}")
        return _Reader(session, owner, measured or {}).tables()


class _Reader:
    """Reads the tables of one training session in one transaction."""

    def __init__(
        self, session: Session, owner: TrainingSession, measured: Mapping[int, Mapping[str, float]]
    ) -> None:
        identity = owner.id
        self._start = owner.started_at or owner.created_at
        self._measured = measured
        self._rounds = list(history.rounds(session, identity))
        self._versions = list(history.versions(session, identity))
        self._updates = list(history.updates(session, identity))
        self._selections = list(history.selections(session, identity))
        self._late = list(history.late(session, identity))
        self._failures = list(history.failures(session, identity))
        self._evaluations = list(history.evaluations(session, identity))

    def tables(self) -> dict[str, list[Row]]:
        makers: dict[str, Callable[[], Iterator[Sequence[Any]]]] = {
            "rounds": self._round_rows,
            "versions": self._version_rows,
            "updates": self._update_rows,
            "metrics": self._metric_rows,
            "timings": self._timing_rows,
            "selections": self._selection_rows,
        }
        return {
            name: [dict(zip(COLUMNS[name], row, strict=True)) for row in make()]
            for name, make in makers.items()
        }

    def _seconds(self, at: datetime | None) -> float | None:
        return None if at is None else (at - self._start).total_seconds()

    def _round_rows(self) -> Iterator[Sequence[Any]]:
        for row in self._rounds:
            yield (
                row["number"],
                row["state"],
                row["state_reason"],
                row["base_version"],
                row["version"],
                row["quorum"],
                row["target"],
                row["selected_count"],
                row["accepted_count"],
                row["rejected_count"],
                row["late_count"],
                row["failed_count"],
                row["example_count"],
            )

    def _version_rows(self) -> Iterator[Sequence[Any]]:
        for row in self._versions:
            yield (
                row["version"],
                row["round_number"],
                row["base_version"],
                row["participant_count"],
                row["example_count"],
                row["aggregation_method"],
                row["epsilon"],
                row["delta"],
                row["released"],
                row["size_bytes"],
                row["payload_digest"],
                self._seconds(row["created_at"]),
            )

    def _update_rows(self) -> Iterator[Sequence[Any]]:
        for row in self._updates:
            yield (
                row["round_number"],
                row["device_id"],
                row["base_version"],
                row["acceptance_sequence"],
                row["state"],
                row["state_reason"],
                row["aggregated_version"],
                row["validation_score"],
                row["example_count"],
                row["size_bytes"],
                row["payload_digest"],
                self._seconds(row["accepted_at"]),
                self._seconds(row["aggregated_at"]),
            )

    def _metric_rows(self) -> Iterator[Sequence[Any]]:
        for row in self._updates:
            for name, value in sorted(row["metrics"].items()):
                yield (
                    "update",
                    row["round_number"],
                    row["base_version"],
                    row["device_id"],
                    name,
                    value,
                )
        made_in = {row["version"]: row["round_number"] for row in self._versions}
        for row in self._evaluations:
            named = made_in.get(row["version"], 0), row["version"], row["device_id"]
            for name, value in sorted(row["metrics"].items()):
                yield "evaluation", *named, name, value
        for row in self._versions:
            own = self._measured.get(row["version"], {})
            for source, values in (("version", row["metrics"]), ("test", own)):
                for name, value in sorted(values.items()):
                    yield source, row["round_number"], row["version"], "", name, value

    def _timing_rows(self) -> Iterator[Sequence[Any]]:
        for row in self._rounds:
            accepted = [
                (item["accepted_at"] - self._start).total_seconds()
                for item in self._updates
                if item["round_number"] == row["number"]
            ]
            yield (
                row["number"],
                self._seconds(row["opened_at"]),
                self._seconds(row["deadline_at"]),
                min(accepted, default=None),
                statistics.median(accepted) if accepted else None,
                max(accepted, default=None),
                self._seconds(row["closed_at"]),
                self._seconds(row["published_at"]),
            )

    def _selection_rows(self) -> Iterator[Sequence[Any]]:
        answers: dict[tuple[int, str], str] = {}
        for answer, rows in (
            ("failed", self._failures),
            ("late", self._late),
            ("accepted", self._updates),
        ):
            answers |= {(row["round_number"], row["device_id"]): answer for row in rows}
        for row in self._selections:
            key = row["round_number"], row["device_id"]
            yield *key, answers.get(key, "none")


def to_arrow(name: str, rows: Sequence[Row]) -> Any:
    """Return a table as a pyarrow.Table, with every column also where there are no rows.

    Raises:
        SimulationError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise SimulationError("needs pyarrow: pip install 'qflare[simulation]'") from error
    return pa.table({column: [row[column] for row in rows] for column in COLUMNS[name]})


def write(folder: Path, tables: Mapping[str, Sequence[Row]], form: str) -> list[Path]:
    """Write each table to a file of the folder and return the files.

    Args:
        folder: Created if it does not exist.
        tables: Rows by name of the table.
        form: csv or parquet.

    Raises:
        SimulationError: pyarrow, which Parquet needs, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in tables.items():
        path = folder / f"{name}.{form}"
        if form == "parquet":
            table = to_arrow(name, rows)
            import pyarrow.parquet as pq  # noqa: PLC0415 - an optional extra

            pq.write_table(table, path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(COLUMNS[name]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        paths.append(path)
    return paths
