"""Commands on queries of federated analytics: create, show.

A query is a training session: `session list`, `session show`, `session cancel` and `model evidence` take it as well.
"""

import argparse
import json
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np

from qflare.analytics.queries import KINDS, TENSOR, InvalidQueryError, Query
from qflare.analytics.results import Cell, Result, result_of
from qflare.command_line import seconds, whole
from qflare.masking.parameters import MaskingParameters
from qflare.tensors import Array
from qflare.terminal import printable, say
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client.admin.arguments import add_command, add_session, add_topic
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import note
from qflare_client.admin.transfers import download_model, upload_model
from qflare_client.errors import CorruptModelError, FailedPreconditionError, InvalidRequestError

RESULT_VERSION: Final = 1
"""Version that is the result of a query."""


@dataclass(frozen=True)
class QueryResult:
    """Result of a query, with the facts that its signed statement holds.

    Attributes:
        session: The training session that the query is.
        query: What was asked.
        version: The version with the noisy mean of the answers.
        result: The table.
    """

    session: training_pb2.TrainingSession
    query: Query
    version: training_pb2.GlobalModel
    result: Result


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "analytics", "queries of federated analytics")
    create = add_command(
        actions,
        "create",
        run_create,
        "ask devices for a statistic of their data",
        "analytics create --name ages --column age --kind histogram --lower 0 --upper 100 --bins 20 "
        "--min-cohort 10 --epsilon 1 --helper HELPER_ID",
    )
    create.add_argument("--name", required=True)
    _add_question(create)
    _add_protection(create)
    create.add_argument("--request-id", help="idempotency key; the same id returns the same query")
    shown = add_command(
        actions,
        "show",
        run_show,
        "show the result of a query",
        "analytics show ages --plot ages.png",
    )
    add_session(shown)
    shown.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="save a picture, .png or .svg (needs qflare[plot])",
    )


def _add_question(create: argparse.ArgumentParser) -> None:
    create.add_argument("--column", required=True, help="name under which devices offer values")
    create.add_argument("--kind", required=True, choices=sorted(KINDS))
    create.add_argument("--lower", type=float, default=0.0, help="smallest value")
    create.add_argument("--upper", type=float, default=0.0, help="largest value")
    create.add_argument("--bins", type=whole(0), default=0, help="bins of a histogram (20 or 100)")
    create.add_argument(
        "--quantile", type=float, action="append", default=[], help="0 to 1; repeatable"
    )
    create.add_argument("--label", action="append", default=[], help="of labels; repeatable")
    create.add_argument(
        "--max-examples",
        type=whole(1),
        default=1,
        help="values that a device counts as at most; 1 counts every device as one (1)",
    )


def _add_protection(create: argparse.ArgumentParser) -> None:
    create.add_argument("--min-cohort", type=whole(2), required=True, help="fewest answers")
    create.add_argument(
        "--devices", type=whole(2), help="answers at which the query closes at once"
    )
    create.add_argument("--deadline-s", type=seconds(0.001), help="longest wait for --devices")
    create.add_argument("--epsilon", type=float, required=True, help="of the result")
    create.add_argument("--delta", type=float, default=0.0, help="of the result (1e-6)")
    masks = create.add_mutually_exclusive_group(required=True)
    masks.add_argument("--helper", action="append", help="helper that hides answers; repeatable")
    masks.add_argument(
        "--unmasked", action="store_true", help="let the coordinator read single answers"
    )
    create.add_argument(
        "--group", action="append", default=[], help="ask only this group; repeatable"
    )


def configuration(options: argparse.Namespace) -> training_pb2.TrainingConfig:
    """Return the configuration of the query that the options describe."""
    config = training_pb2.TrainingConfig(
        groups=options.group,
        analytics=training_pb2.AnalyticsQuery(
            column=options.column,
            kind=KINDS[options.kind],
            lower=options.lower,
            upper=options.upper,
            bins=options.bins,
            quantiles=options.quantile,
            labels=options.label,
            max_examples=options.max_examples,
            unmasked=options.unmasked,
        ),
        privacy=training_pb2.PrivacyPolicy(epsilon_budget=options.epsilon, delta=options.delta),
        rounds=training_pb2.RoundPolicy(quorum=options.min_cohort, target=options.devices or 0),
    )
    if options.deadline_s is not None:
        config.rounds.deadline.FromNanoseconds(int(options.deadline_s * 1e9))
    if options.helper:
        config.secure_aggregation.mode = training_pb2.SECURE_AGGREGATION_MODE_HELPER
        config.secure_aggregation.helpers.extend(options.helper)
    return config


def create_query(
    admin: Admin, name: str, config: training_pb2.TrainingConfig, request_id: str = ""
) -> training_pb2.TrainingSession:
    """Create and start a query.

    Args:
        admin: The connection.
        name: 1 to 200 characters.
        config: With `analytics`.
        request_id: Idempotency key; empty means one of this call.

    Raises:
        InvalidRequestError: The query is refused.
        QflareClientError: A call failed.
    """
    try:
        query = Query.from_proto(config.analytics)
    except InvalidQueryError as error:
        raise InvalidRequestError(f"analytics.{error}") from error
    request = pb.CreateTrainingSessionRequest(name=name, config=config, request_id=request_id)
    session = admin.call("CreateTrainingSession", request).training_session
    session_id = session.training_session_id
    if session.current_version < 0:
        zeros: dict[str, Array] = {TENSOR: np.zeros(query.element_count, np.float32)}
        try:
            upload_model(admin, session_id, zeros)
        except BaseException:
            reason = "its vector was not uploaded"
            cancel = pb.CancelTrainingSessionRequest(training_session_id=session_id, reason=reason)
            admin.call("CancelTrainingSession", cancel)
            raise
    started: training_pb2.TrainingSession = admin.call(
        "StartTrainingSession", pb.StartTrainingSessionRequest(training_session_id=session_id)
    ).training_session
    return started


def read_result(admin: Admin, training_session_id: str) -> QueryResult:
    """Return the result of a query.

    Raises:
        InvalidRequestError: The training session is no query.
        FailedPreconditionError: There is no result yet.
        CorruptModelError: The result does not match its statement.
        QflareClientError: A call failed.
    """
    session = admin.call(
        "GetTrainingSession", pb.GetTrainingSessionRequest(training_session_id=training_session_id)
    ).training_session
    if not session.config.HasField("analytics"):
        raise InvalidRequestError(f"{session.name[:200]} trains a model and is no query")
    if session.current_version < RESULT_VERSION:
        state = training_pb2.TrainingSessionState.Name(session.state)
        word = state.removeprefix("TRAINING_SESSION_STATE_").lower()
        raise FailedPreconditionError(f"there is no result yet: the query is {word}")
    model, chunks = download_model(admin, training_session_id, RESULT_VERSION)
    try:
        query, table = result_in(session.config, b"".join(chunks))
    except ValueError as error:
        raise CorruptModelError(f"the result is not that of the query: {error}") from error
    return QueryResult(session, query, model, table)


def result_in(config: training_pb2.TrainingConfig, data: bytes) -> tuple[Query, Result]:
    """Return a query and its result from the payload of its version.

    Args:
        config: Of the training session, complete.
        data: The payload.

    Raises:
        ValueError: It is the payload of another query.
    """
    query = Query.from_proto(config.analytics)
    mean = np.frombuffer(data, "<f4").astype(np.float64)
    return query, result_of(query, mean * config.rounds.target, _stddev(config, query))


def _stddev(config: training_pb2.TrainingConfig, query: Query) -> float:
    """Return the standard deviation of the noise in the sum of the answers, which covers their rounding too."""
    privacy, sensitivity = config.privacy, config.privacy.clip_norm
    if config.secure_aggregation.mode:
        scale = MaskingParameters.of(config.secure_aggregation, 1).scale
        sensitivity += sqrt(query.element_count) / scale
    return privacy.noise_multiplier * sensitivity


def run_create(admin: Admin, options: argparse.Namespace) -> None:
    """Create and start a query; its id is printed."""
    session = create_query(admin, options.name, configuration(options), options.request_id or "")
    if options.json:
        say(json.dumps({"training_session_id": session.training_session_id}))
    else:
        say(printable(session.training_session_id))


def run_show(admin: Admin, options: argparse.Namespace) -> None:
    """Print the result of a query as a table or JSON, and save a picture of it."""
    found = read_result(admin, options.session)
    if options.plot is not None:
        from qflare_client.admin.plots import save_result  # noqa: PLC0415 - an extra

        save_result(options.plot, found.session.name, found.result)
        note(f"wrote {options.plot}")
    say(json.dumps(_as_json(found), indent=2) if options.json else _as_text(found))


def _as_json(found: QueryResult) -> dict[str, Any]:
    rows = [
        dict(zip(found.result.columns, map(_plain, row), strict=True)) for row in found.result.rows
    ]
    return {
        "training_session_id": found.session.training_session_id,
        "column": found.query.column,
        "kind": found.query.kind,
        "rows": rows,
        "noise_deviation": found.result.error,
        "answers": found.version.participant_count,
        "epsilon": found.version.epsilon,
        "delta": found.version.delta,
        "digest": found.version.digest,
    }


def _plain(cell: Cell) -> Cell | None:
    """Return a cell as JSON knows it: numbers that are not finite are null."""
    return cell if isinstance(cell, str) or isfinite(cell) else None


def _as_text(found: QueryResult) -> str:
    version, result = found.version, found.result
    facts = (
        f"{version.participant_count} answers, epsilon {version.epsilon:.4g} at delta {version.delta:.3g}; "
        f"the noise has a deviation of {result.error:.4g}"
    )
    return "\n".join([*as_lines(result), facts])


def as_lines(result: Result) -> list[str]:
    """Return the table of a result as lines of text."""
    cells = [list(result.columns), *([_shown(cell) for cell in row] for row in result.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _shown(cell: Cell) -> str:
    return printable(cell) if isinstance(cell, str) else f"{cell:.6g}"
