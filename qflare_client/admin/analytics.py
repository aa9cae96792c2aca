"""Commands on queries of federated analytics: create, show, refine.

A query is a training session: `session list`, `session show`, `session cancel` and `model evidence` take it as well.
"""

import argparse
import json
from math import isfinite
from pathlib import Path
from typing import Any

from qflare.analytics.queries import KINDS
from qflare.analytics.results import Cell, Result
from qflare.command_line import positive, seconds, whole
from qflare.terminal import printable, say
from qflare.v1 import training_pb2
from qflare_client.admin.arguments import add_command, add_session, add_topic
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import note
from qflare_client.admin.queries import (
    Protection,
    QueryResult,
    Question,
    create_query,
    query_config,
    read_result,
    refine_query,
)


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
    _add_refine(actions)


def _add_refine(actions: Any) -> None:
    refine = add_command(
        actions,
        "refine",
        run_refine,
        "ask for a quantile again, with bins only where the result of a query says that it lies",
        "analytics refine ages --name median --quantile 0.5 --epsilon 1",
    )
    add_session(refine)
    refine.add_argument("--name", required=True, help="of the new query")
    refine.add_argument("--quantile", type=float, required=True, help="0 to 1")
    refine.add_argument("--bins", type=whole(1), default=0, help="bins of the new query (100)")
    refine.add_argument("--epsilon", type=positive, required=True, help="of the new result")
    refine.add_argument("--delta", type=positive, default=0.0, help="of the new result (1e-6)")
    refine.add_argument("--request-id", help="idempotency key; the same id returns the same query")


def _add_question(create: argparse.ArgumentParser) -> None:
    create.add_argument("--column", required=True, help="name under which devices offer values")
    create.add_argument("--kind", required=True, choices=sorted(KINDS))
    create.add_argument("--lower", type=float, default=0.0, help="smallest value")
    create.add_argument("--upper", type=float, default=0.0, help="largest value")
    create.add_argument("--bins", type=whole(1), default=0, help="bins of a histogram (20 or 100)")
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
    create.add_argument(
        "--min-cohort",
        type=whole(2),
        required=True,
        help="fewest answers that are added up before anybody sees a number; with --neighbors, in each group",
    )
    create.add_argument(
        "--min-answers", type=whole(2), help="fewest answers in the result (--min-cohort)"
    )
    create.add_argument(
        "--devices",
        type=whole(2),
        help="answers at which the query closes at once; with --neighbors, most devices that may answer",
    )
    create.add_argument("--deadline-s", type=seconds(0.001), help="longest wait for --devices")
    create.add_argument("--epsilon", type=positive, required=True, help="of the result")
    create.add_argument("--delta", type=positive, default=0.0, help="of the result (1e-6)")
    masks = create.add_mutually_exclusive_group(required=True)
    masks.add_argument("--helper", action="append", help="helper that hides answers; repeatable")
    masks.add_argument(
        "--neighbors",
        action="store_true",
        help="let devices hide answers in groups, without a helper",
    )
    masks.add_argument(
        "--unmasked", action="store_true", help="let the coordinator read single answers"
    )
    _add_neighbors(create)
    create.add_argument(
        "--group", action="append", default=[], help="ask only this group; repeatable"
    )


def _add_neighbors(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--group-size", type=whole(1), default=0, help="fewest devices of a group (one group)"
    )
    create.add_argument(
        "--corrupt-fraction",
        type=positive,
        default=0.0,
        help="share of a group that may collude with the coordinator (0.2)",
    )
    create.add_argument(
        "--dropout-fraction",
        type=positive,
        default=0.0,
        help="share of a group that may drop out (0.1)",
    )
    create.add_argument(
        "--step-timeout-s",
        type=seconds(0.001),
        help="time for each step of groups before and after the answers (60)",
    )


def configuration(options: argparse.Namespace) -> training_pb2.TrainingConfig:
    """Return the configuration of the query that the options describe."""
    question = Question(
        column=options.column,
        kind=options.kind,
        lower=options.lower,
        upper=options.upper,
        bins=options.bins,
        quantiles=options.quantile,
        labels=options.label,
        max_examples=options.max_examples,
    )
    protection = Protection(
        min_cohort=options.min_cohort,
        epsilon=options.epsilon,
        delta=options.delta,
        helpers=options.helper or (),
        neighbors=options.neighbors,
        group_size=options.group_size,
        corrupt_fraction=options.corrupt_fraction,
        dropout_fraction=options.dropout_fraction,
        step_timeout_s=options.step_timeout_s,
        min_answers=options.min_answers,
        devices=options.devices,
        deadline_s=options.deadline_s,
        groups=options.group,
    )
    return query_config(question, protection)


def run_create(admin: Admin, options: argparse.Namespace) -> None:
    """Create and start a query; its id is printed."""
    _say_created(
        create_query(admin, options.name, configuration(options), options.request_id or ""), options
    )


def run_refine(admin: Admin, options: argparse.Namespace) -> None:
    """Create and start a query between narrower bounds; its id is printed, and the bounds beside it."""
    session = refine_query(
        admin,
        options.session,
        options.name,
        options.quantile,
        epsilon=options.epsilon,
        delta=options.delta,
        bins=options.bins,
        request_id=options.request_id or "",
    )
    query = session.config.analytics
    note(f"the quantile lies between {query.lower:g} and {query.upper:g}")
    _say_created(session, options)


def _say_created(session: training_pb2.TrainingSession, options: argparse.Namespace) -> None:
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
        "neighbors": _progress(found.neighbors),
    }


def _progress(found: training_pb2.NeighborProgress | None) -> dict[str, int] | None:
    """Return how many devices and groups came how far; None without neighbors."""
    if found is None:
        return None
    return {
        "advertised": found.advertised_count,
        "in_sums": found.survivor_count,
        "opened_groups": found.opened_group_count,
        "aborted_groups": found.aborted_group_count,
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
    return "\n".join([*as_lines(result), facts, *_groups(found)])


def _groups(found: QueryResult) -> list[str]:
    """Return in which sums the answers are; empty without neighbors."""
    counts = _progress(found.neighbors)
    if counts is None:
        return []
    least = found.session.config.secure_aggregation.min_cohort
    text = (
        f"groups of at least {least} answers: {counts['opened_groups']} in the result, {counts['aborted_groups']} "
        f"aborted; devices: {counts['advertised']} advertised, {counts['in_sums']} in sums"
    )
    return [text]


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
