"""Command definitions: a parser with an example, and the function that runs the command."""

import argparse
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import Message

from qflare.terminal import say
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import Column, facts, note, print_json, table

REFERENCE: Final = "name, id, or beginning of its id (4 characters or more)"
Run = Callable[[Admin, argparse.Namespace], None]


def add_topic(commands: Any, name: str, text: str) -> Any:
    """Add a topic, such as `device`, and return the object to which its commands are added."""
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(required=True, metavar="COMMAND")


def add_command(
    actions: Any, name: str, run: Run, text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command; `example` is shown after the program name."""
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  qflare-admin {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print proto JSON")
    parser.set_defaults(run=run)
    return parser


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option that limits the entries of a list."""
    parser.add_argument(
        "--limit", type=_count, default=50, help="maximum number of entries; 0 means all (50)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a device."""
    parser.add_argument("device", metavar="DEVICE", help=REFERENCE)


def add_session(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a training session."""
    parser.add_argument("session", metavar="SESSION", help=REFERENCE)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("want 0 or more")
    return value


def choice(enum: Any, prefix: str) -> dict[str, int]:
    """Return the command-line words of an enum: active for DEVICE_STATE_ACTIVE."""
    return {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}


def show(
    options: argparse.Namespace, answer: Message, shown: Message, columns: list[Column]
) -> None:
    """Print one message of a response, or the response as JSON."""
    if options.json:
        print_json(answer)
    else:
        say(facts(shown, columns))


def show_list(options: argparse.Namespace, answer: Any, field: str, columns: list[Column]) -> None:
    """Print the entries of a list, or the list as JSON."""
    if options.json:
        print_json(answer)
        return
    say(table(getattr(answer, field), columns))
    if answer.next_page_token:
        note("there are more: raise --limit")
