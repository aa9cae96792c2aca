"""`session`: create, start, pause, resume and cancel training sessions."""

import argparse
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from qflare.command_line import seconds, whole
from qflare.terminal import say
from qflare.v1 import training_pb2
from qflare_server.cli.models import upload_initial_model
from qflare_server.cli.terminal import caller
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.serving.application import open_application


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
    create.add_argument("--model-type", default="")
    create.add_argument("--rounds", type=whole(0), default=0, help="rounds to run")
    create.add_argument("--quorum", type=whole(0), default=0, help="updates that make a version")
    create.add_argument(
        "--deadline-s", type=seconds(0.001), help="seconds that a round is open at most"
    )
    create.add_argument("--strategy", default="", help="default: fedavg")
    create.add_argument(
        "--group",
        action="append",
        default=[],
        help="open to devices of this group alone; repeatable",
    )
    create.add_argument(
        "--sealed", action="store_true", help="seal updates and models end to end and at rest"
    )
    create.add_argument("--config", type=Path, help="TrainingConfig as JSON; flags override")
    create.add_argument("--model", type=Path, help="initial model, .safetensors")
    create.add_argument("--start", action="store_true", help="start the first round")
    create.set_defaults(run=run_create)
    for word in ("start", "pause", "resume", "cancel"):
        action = actions.add_parser(word, help=f"{word} a training session")
        action.add_argument("session", help="id")
        action.set_defaults(run=run_transition, transition=word)


def run_create(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Create a training session."""
    wanted = _training_config(arguments)
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
            upload_initial_model(parts.use_cases.initial_models, created.id, arguments.model)
        if arguments.start:
            training.start(caller(), created.id)
    say(created.id)
    return 0


def _training_config(arguments: argparse.Namespace) -> training_pb2.TrainingConfig:
    wanted = training_pb2.TrainingConfig()
    if arguments.config is not None:
        try:
            json_format.Parse(arguments.config.read_text(), wanted)
        except json_format.ParseError as error:
            raise ConfigError(
                f"{arguments.config}: {error}",
                remedy="the fields of qflare.v1.TrainingConfig; protos/qflare/v1/training.proto describes them",
            ) from error
    wanted.total_rounds = arguments.rounds or wanted.total_rounds
    wanted.rounds.quorum = arguments.quorum or wanted.rounds.quorum
    wanted.strategy.name = arguments.strategy or wanted.strategy.name
    wanted.transfer.sealed = arguments.sealed or wanted.transfer.sealed
    if arguments.group:
        wanted.groups[:] = arguments.group
    if arguments.deadline_s is not None:
        deadline = Duration()
        deadline.FromNanoseconds(int(arguments.deadline_s * 1e9))
        wanted.rounds.deadline.CopyFrom(deadline)
    return wanted


def run_transition(config: ServerConfig, arguments: argparse.Namespace) -> int:
    """Start, pause, resume or cancel a training session."""
    with open_application(config) as parts:
        training = parts.use_cases.training
        if arguments.transition == "cancel":
            row = training.cancel(caller(), arguments.session, "cancelled by command")
        else:
            row = getattr(training, arguments.transition)(caller(), arguments.session)
    say(f"{row.id} {row.state}")
    return 0
