"""`session`: create, validate, start, pause, resume and cancel training sessions."""

import argparse
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from qflare.terminal import complain, say
from qflare.training_settings import add_flags, from_flags
from qflare.v1 import training_pb2
from qflare_server.cli.models import open_model, upload_initial_model
from qflare_server.cli.terminal import REFERENCE, caller
from qflare_server.config import ServerConfig
from qflare_server.serving.application import open_application
from qflare_server.training.strategy import warnings_of
from qflare_server.use_cases.training_sessions.administration import checked
from qflare_server.use_cases.versions.initial_model import checked_layout


def add(commands: Any) -> None:
    """Add this module's parsers."""
    session = commands.add_parser("session", help="create and start training sessions")
    actions = session.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="create a training session, with --model also start it",
        epilog="example: qflare-server session create --name digits --rounds 20 --quorum 10"
        " --model initial.safetensors --start",
    )
    create.add_argument("--name", required=True)
    create.add_argument("--model-type", default="", help="kind of model, free text")
    add_flags(create)
    create.add_argument("--model", type=Path, help="initial model, .safetensors")
    create.add_argument("--start", action="store_true", help="start the first round")
    create.set_defaults(run=run_create)
    validate = actions.add_parser(
        "validate",
        help="validate a configuration and a model without creating anything",
        epilog="example: qflare-server session validate --config session.toml --model initial.safetensors",
    )
    validate.add_argument("--name", default="unnamed")
    validate.add_argument("--model-type", default="", help="kind of model, free text")
    add_flags(validate)
    validate.add_argument("--model", type=Path, help="initial model, .safetensors")
    validate.set_defaults(run=run_validate)
    for word in ("start", "pause", "resume", "cancel"):
        action = actions.add_parser(word, help=f"{word} a training session")
        action.add_argument("session", help=REFERENCE)
        action.set_defaults(run=run_transition, transition=word)


def run_create(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Create a training session; nothing is created if its configuration or its model is refused."""
    wanted = from_flags(arguments)
    _check(config, arguments, wanted)
    with open_application(config) as parts:
        training = parts.use_cases.training
        created = training.create(
            caller(),
            name=arguments.name,
            model_type=arguments.model_type,
            architecture={},
            config=wanted,
        )
        if arguments.model is not None:
            try:
                upload_initial_model(parts.use_cases.initial_models, created.id, arguments.model)
            except BaseException:
                training.cancel(caller(), created.id, "its initial model was not uploaded")
                raise
        if arguments.start:
            training.start(caller(), created.id)
    say(created.id)
    return 0


def run_validate(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Print the configuration with all defaults, and warnings, or why it is refused."""
    done = _check(config, arguments, from_flags(arguments))
    say(json_format.MessageToJson(done, preserving_proto_field_name=True))
    for warning in warnings_of(done):
        complain(f"warning: {warning}")
    return 0


def _check(
    config: ServerConfig, arguments: argparse.Namespace, wanted: training_pb2.TrainingConfig
) -> training_pb2.TrainingConfig:
    """Return the configuration with all defaults but the seed, which is drawn when the training session is created."""
    done = checked(arguments.name, arguments.model_type, wanted)
    if arguments.model is not None:
        layout = open_model(arguments.model).manifest.to_proto()
        checked_layout(config, done, layout)
    done.selection.seed = wanted.selection.seed
    return done


def run_transition(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Start, pause, resume or cancel a training session."""
    with open_application(config) as parts:
        training = parts.use_cases.training
        session_id = training.find_id(arguments.session)
        if arguments.transition == "cancel":
            row = training.cancel(caller(), session_id, "cancelled by command")
        else:
            row = getattr(training, arguments.transition)(caller(), session_id)
    say(f"{row.name} ({row.id}) {row.state}")
    return 0
