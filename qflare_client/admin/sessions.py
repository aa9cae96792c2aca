"""Commands on training sessions: create, list, show, start, pause, resume, update, cancel, rounds, updates."""

import argparse
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format

from qflare.command_line import seconds, whole
from qflare.references import short_id
from qflare.terminal import printable, say
from qflare.training_settings import add_flags, from_flags
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client.admin.arguments import (
    add_command,
    add_limit,
    add_session,
    add_topic,
    choice,
    show,
    show_list,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import (
    Column,
    best_version,
    metrics,
    moment,
    note,
    notice_lines,
    optional,
    print_json,
    round_of,
    span,
    word,
)
from qflare_client.admin.transfers import open_model, upload_model

STATES = choice(training_pb2.TrainingSessionState, "TRAINING_SESSION_STATE_")
SESSION: list[Column] = [
    ("name", lambda row: row.name),
    ("id", lambda row: short_id(row.training_session_id)),
    ("state", lambda row: word(row, "state")),
    ("round", lambda row: round_of(row, row.current_round)),
    ("version", lambda row: row.current_version if row.current_version >= 0 else None),
    ("released", lambda row: optional(row, "released_version")),
    ("best", best_version),
    ("created", lambda row: moment(row, "create_time")),
]
SESSION_FACTS: list[Column] = [
    SESSION[0],
    ("id", lambda row: row.training_session_id),
    *SESSION[2:],
    ("reason", lambda row: row.state_reason),
    ("model type", lambda row: row.model_type),
    ("strategy", lambda row: row.config.strategy.name),
    ("quorum", lambda row: row.config.rounds.quorum),
    ("target", lambda row: _target(row.config.rounds)),
    ("deadline", lambda row: span(row.config.rounds, "deadline")),
    ("failure limit", lambda row: _failure_limit(row.config)),
    ("groups", lambda row: ",".join(row.config.groups)),
    ("sealed", lambda row: row.config.transfer.sealed or None),
    ("secure aggregation", lambda row: _secure_aggregation(row.config.secure_aggregation)),
    ("epsilon spent", lambda row: optional(row, "epsilon_spent")),
    ("started", lambda row: moment(row, "start_time")),
    ("ended", lambda row: moment(row, "end_time")),
    ("warnings", lambda row: "; ".join(row.warnings)),
]


def _target(rounds: training_pb2.RoundPolicy) -> int | None:
    """Return the target of rounds where it is not the quorum."""
    return rounds.target if rounds.target != rounds.quorum else None


def _failure_limit(config: training_pb2.TrainingConfig) -> str | None:
    """Return how many devices of a round may fail and what happens otherwise; None without a limit."""
    policy, limits = config.failures, []
    if policy.HasField("max_failures"):
        limits.append(f"{policy.max_failures} devices")
    if policy.HasField("max_failed_fraction"):
        limits.append(f"{policy.max_failed_fraction:.0%} of the devices")
    return f"{' and '.join(limits)}, else {word(policy, 'action')}" if limits else None


_SHOWN_WEIGHTS: Final = 8


def _secure_aggregation(policy: training_pb2.SecureAggregationPolicy) -> str | None:
    """Return the bounds of a sum of masked updates and the helpers; None without secure aggregation."""
    if not policy.mode:
        return None
    bounds = f"{policy.min_cohort} to {policy.max_cohort} updates in a sum, {policy.bits} bits"
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        size = f"groups of {policy.group_size}" if policy.group_size else "one group"
        return f"{bounds}, neighbors in {size}{_noise_of(policy)}"
    helpers = ", ".join(short_id(helper_id) for helper_id in policy.helpers)
    weights = "/".join(str(weight) for weight in policy.staleness_weights[:_SHOWN_WEIGHTS])
    more = "/..." if len(policy.staleness_weights) > _SHOWN_WEIGHTS else ""
    stale = f", staleness weights {weights}{more}" if weights else ""
    return f"{bounds}{stale}, helper {helpers}{_noise_of(policy)}"


def _noise_of(policy: training_pb2.SecureAggregationPolicy) -> str:
    """Return who adds noise to the sum before the coordinator gets it; empty if nobody does."""
    if policy.noise not in (training_pb2.NOISE_SOURCE_DEVICES, training_pb2.NOISE_SOURCE_HELPER):
        return ""
    return f", noise of {word(policy, 'noise')}"


_GROUP_STAGES: Final = ("sharing", "training", "confirming", "revealing", "opened", "aborted")


def _groups(row: training_pb2.Round) -> str | None:
    """Return how far the groups of secure aggregation with neighbors are; None without them."""
    if not row.HasField("neighbors"):
        return None
    found = row.neighbors
    if not any(getattr(found, f"{stage}_group_count") for stage in _GROUP_STAGES):
        return f"{found.advertised_count} devices advertised"
    counts = {stage: getattr(found, f"{stage}_group_count") for stage in _GROUP_STAGES}
    stages = ", ".join(f"{count} {stage}" for stage, count in counts.items() if count)
    return (
        f"{stages}; of {found.advertised_count} devices {found.sharer_count} shared, "
        f"{found.survivor_count} in sums"
    )


def _took(row: Any) -> str | None:
    """Return how long a round accepted updates."""
    if not row.HasField("close_time"):
        return None
    taken = row.close_time.ToNanoseconds() - row.open_time.ToNanoseconds()
    return f"{taken / 1e9:.1f} s"


ROUND: list[Column] = [
    ("round", lambda row: row.round_number),
    ("state", lambda row: word(row, "state")),
    ("base", lambda row: row.base_version),
    ("version", lambda row: optional(row, "version")),
    ("selected", lambda row: row.selected_count or "all"),
    ("accepted", lambda row: row.accepted_count),
    ("rejected", lambda row: row.rejected_count),
    ("late", lambda row: row.late_count),
    ("failed", lambda row: row.failed_count),
    ("examples", lambda row: row.example_count),
    ("opened", lambda row: moment(row, "open_time")),
    ("collecting", _took),
    ("publishing", lambda row: span(row, "publish_duration")),
    ("neighbor groups", _groups),
    ("reason", lambda row: row.state_reason),
]
STAGES = {
    training_pb2.ROUND_STATE_OPEN: "takes masked updates",
    training_pb2.ROUND_STATE_CLOSED: "asks the helpers",
    training_pb2.ROUND_STATE_PUBLISHED: "unmasked",
    training_pb2.ROUND_STATE_FAILED: "not unmasked",
    training_pb2.ROUND_STATE_CANCELLED: "not unmasked",
}
"""Stage of secure aggregation with helpers by state of the round."""


def masked_columns(config: training_pb2.TrainingConfig) -> list[Column]:
    """Return the columns on secure aggregation with helpers of a round; none without it."""
    if config.secure_aggregation.mode != training_pb2.SECURE_AGGREGATION_MODE_HELPER:
        return []
    target = config.rounds.target
    return [
        ("stage", lambda row: STAGES.get(row.state)),
        ("cohort", lambda row: max(0, row.accepted_count - row.rejected_count)),
        ("drop-outs", lambda row: _dropped_out(row, target)),
    ]


def _dropped_out(row: training_pb2.Round, target: int) -> int | None:
    """Return the devices that a round has waited for and that sent no update; None while it is open."""
    if row.state == training_pb2.ROUND_STATE_OPEN:
        return None
    return max(0, (row.selected_count or target) - row.accepted_count - row.late_count)


UPDATE: list[Column] = [
    ("sequence", lambda row: row.acceptance_sequence),
    ("device", lambda row: row.device_name),
    ("id", lambda row: short_id(row.device_id)),
    ("state", lambda row: word(row, "state")),
    ("base", lambda row: row.base_version),
    ("bytes", lambda row: row.size_bytes),
    ("examples", lambda row: row.example_count),
    ("training metrics", lambda row: metrics(row.metrics)),
    ("score", lambda row: optional(row, "validation_score")),
    ("accepted", lambda row: moment(row, "accept_time")),
    ("reason", lambda row: row.state_reason),
]
CHANGES = {
    "start": "start the first round",
    "pause": "accept no updates until it is resumed",
    "resume": "resume after a pause",
    "cancel": "end it and keep its versions",
}


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    actions = add_topic(commands, "session", "training sessions")
    _add_create(actions)
    validate = add_command(
        actions,
        "validate",
        run_validate,
        "check a configuration and a model, and create nothing",
        "session validate --config session.toml --model initial.safetensors",
    )
    validate.add_argument("--name", default="unnamed")
    _add_description(validate)
    listing = add_command(
        actions, "list", run_list, "list training sessions", "session list --state running"
    )
    listing.add_argument(
        "--state", choices=sorted(STATES), help="only training sessions in this state"
    )
    add_limit(listing)
    shown = add_command(actions, "show", run_show, "show a training session", "session show digits")
    add_session(shown)
    for name, text in CHANGES.items():
        change = add_command(actions, name, run_change, text, f"session {name} digits")
        add_session(change)
        change.set_defaults(change=name)
        if name == "cancel":
            change.add_argument("--reason", default="", help="for the audit log")
    _add_update(actions)
    rounds = add_command(actions, "rounds", run_rounds, "list rounds", "session rounds digits")
    add_session(rounds)
    add_limit(rounds)
    updates = add_command(
        actions, "updates", run_updates, "list the updates of a round", "session updates digits 3"
    )
    add_session(updates)
    updates.add_argument("round", type=whole(1))
    add_limit(updates)
    aggregation = add_command(
        actions,
        "aggregation",
        run_aggregation,
        "show the progress of the current round",
        "session aggregation digits",
    )
    add_session(aggregation)


def _add_update(actions: Any) -> None:
    update = add_command(
        actions,
        "update",
        run_update,
        "change when rounds close, from the open round on",
        "session update digits --quorum 8 --deadline-s 3600",
    )
    add_session(update)
    update.add_argument("--quorum", type=whole(1), help="updates required for a version")
    update.add_argument("--target", type=whole(1), help="updates at which a round closes at once")
    update.add_argument(
        "--deadline-s", type=seconds(0.001), help="maximum duration of a round in seconds"
    )


def _add_create(actions: Any) -> None:
    create = add_command(
        actions,
        "create",
        run_create,
        "create a training session",
        "session create --name digits --rounds 20 --quorum 10 --config config.json",
    )
    create.add_argument("--name", required=True)
    _add_description(create)
    create.add_argument("--start", action="store_true", help="start the first round")
    create.add_argument(
        "--request-id", help="idempotency key; the same id returns the same training session"
    )


def _add_description(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-type", default="", help="kind of model, free text")
    add_flags(parser)
    parser.add_argument("--model", type=Path, metavar="FILE", help="initial model, .safetensors")


def run_create(admin: Admin, options: argparse.Namespace) -> None:
    """Create a training session; for people its id alone is printed.

    Nothing is created if its configuration or its model is refused.
    """
    request = _request(options)
    request.request_id = options.request_id or ""
    if options.model is not None:
        _validate(admin, options, request)
    answer = admin.call("CreateTrainingSession", request)
    session_id = answer.training_session.training_session_id
    if options.model is not None:
        try:
            upload_model(admin, session_id, options.model)
        except BaseException:
            reason = "its initial model was not uploaded"
            _change(admin, "Cancel", session_id, reason=reason)
            raise
    if options.start:
        answer = _change(admin, "Start", session_id)
    if options.json:
        show(options, answer, answer.training_session, SESSION_FACTS)
    else:
        say(printable(session_id))


def run_validate(admin: Admin, options: argparse.Namespace) -> None:
    """Print the configuration with all defaults, and warnings."""
    answer = _validate(admin, options, _request(options))
    if options.json:
        print_json(answer)
        return
    created = answer.training_session
    say(json_format.MessageToJson(created.config, preserving_proto_field_name=True))
    for warning in created.warnings:
        note(f"warning: {warning}")


def _request(options: argparse.Namespace) -> pb.CreateTrainingSessionRequest:
    return pb.CreateTrainingSessionRequest(
        name=options.name, model_type=options.model_type, config=from_flags(options)
    )


def _validate(
    admin: Admin, options: argparse.Namespace, request: pb.CreateTrainingSessionRequest
) -> Any:
    asked = pb.CreateTrainingSessionRequest()
    asked.CopyFrom(request)
    asked.validate_only = True
    if options.model is not None:
        asked.manifest.CopyFrom(open_model(options.model).manifest.to_proto())
    return admin.call("CreateTrainingSession", asked)


def run_list(admin: Admin, options: argparse.Namespace) -> None:
    """List training sessions."""
    request = pb.ListTrainingSessionsRequest()
    if options.state:
        request = pb.ListTrainingSessionsRequest(state=STATES[options.state])  # type: ignore[arg-type]
    answer = admin.collect("ListTrainingSessions", request, "training_sessions", options.limit)
    show_list(options, answer, "training_sessions", SESSION)


def run_show(admin: Admin, options: argparse.Namespace) -> None:
    """Show a training session."""
    answer = admin.call(
        "GetTrainingSession", pb.GetTrainingSessionRequest(training_session_id=options.session)
    )
    show(options, answer, answer.training_session, SESSION_FACTS)
    if not options.json:
        _say_masking(admin, answer.training_session)
        for line in notice_lines(answer.notices):
            say(printable(line))


def _say_masking(admin: Admin, session: training_pb2.TrainingSession) -> None:
    """Say at which stage the secure aggregation of the current round is; nothing without it or before the start."""
    columns = masked_columns(session.config)
    if not columns or not session.current_round:
        return
    request = pb.GetAggregationStatusRequest(training_session_id=session.training_session_id)
    current = admin.call("GetAggregationStatus", request).round
    facts = [(name, value(current)) for name, value in columns]
    shown = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
    say(printable(f"round {current.round_number}: {shown}"))


def _of_round(columns: list[Column]) -> list[Column]:
    """Return columns of a round for messages that hold one."""
    return [(name, partial(_round_value, value)) for name, value in columns]


def _round_value(value: Callable[[Any], object], row: Any) -> object:
    return value(row.round)


def run_change(admin: Admin, options: argparse.Namespace) -> None:
    """Start, pause, resume or cancel a training session."""
    reason = {"reason": options.reason} if options.change == "cancel" else {}
    answer = _change(admin, options.change.capitalize(), options.session, **reason)
    show(options, answer, answer.training_session, SESSION)


def run_update(admin: Admin, options: argparse.Namespace) -> None:
    """Change when the rounds of a training session close."""
    request = pb.UpdateTrainingSessionRequest(
        training_session_id=options.session, quorum=options.quorum, target=options.target
    )
    if options.deadline_s is not None:
        request.deadline.FromTimedelta(timedelta(seconds=options.deadline_s))
    answer = admin.call("UpdateTrainingSession", request)
    show(options, answer, answer.training_session, SESSION_FACTS)


def _change(admin: Admin, change: str, session_id: str, **fields: str) -> Any:
    method = f"{change}TrainingSession"
    request = getattr(pb, f"{method}Request")(training_session_id=session_id, **fields)
    return admin.call(method, request)


def run_rounds(admin: Admin, options: argparse.Namespace) -> None:
    """List rounds."""
    request = pb.ListRoundsRequest(training_session_id=options.session)
    answer = admin.collect("ListRounds", request, "rounds", options.limit)
    columns = ROUND if options.json else _with_masking(ROUND, _config(admin, options.session))
    show_list(options, answer, "rounds", columns)


def _config(admin: Admin, session_id: str) -> training_pb2.TrainingConfig:
    request = pb.GetTrainingSessionRequest(training_session_id=session_id)
    config: training_pb2.TrainingConfig = admin.call(
        "GetTrainingSession", request
    ).training_session.config
    return config


def _with_masking(columns: list[Column], config: training_pb2.TrainingConfig) -> list[Column]:
    """Return the columns of rounds with those on secure aggregation after the state."""
    return [*columns[:2], *masked_columns(config), *columns[2:]]


def run_updates(admin: Admin, options: argparse.Namespace) -> None:
    """List the updates of a round."""
    request = pb.ListUpdatesRequest(training_session_id=options.session, round_number=options.round)
    answer = admin.collect("ListUpdates", request, "updates", options.limit)
    show_list(options, answer, "updates", UPDATE)


def run_aggregation(admin: Admin, options: argparse.Namespace) -> None:
    """Show the progress of the current round and its aggregation."""
    request = pb.GetAggregationStatusRequest(training_session_id=options.session)
    answer = admin.call("GetAggregationStatus", request)
    columns: list[Column] = [
        ("round", lambda row: row.round.round_number),
        ("state", lambda row: word(row.round, "state")),
        ("accepted", lambda row: row.round.accepted_count),
        ("missing", lambda row: row.missing_update_count),
        ("pending", lambda row: row.pending_update_count),
        ("version", lambda row: row.current_version),
        ("published", lambda row: moment(row, "last_publish_time")),
        ("time left", lambda row: span(row, "remaining_duration")),
    ]
    if not options.json:
        columns[2:2] = _of_round(masked_columns(_config(admin, options.session)))
    show(options, answer, answer, columns)
