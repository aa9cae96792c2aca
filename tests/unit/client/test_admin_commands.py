"""The commands of administrators: every method has one, every one has an example that parses."""

import argparse
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import qflare_client.admin
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2
from qflare_client.admin.__main__ import exit_code, parser
from qflare_client.admin.live import Screen
from qflare_client.admin.output import seconds, size, table, word
from qflare_client.admin.profile import Profile, ProfileError
from qflare_client.errors import (
    AuthenticationError,
    BusyError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)

FOLDER = Path(qflare_client.admin.__file__).parent
CHANGES = {"Start", "Pause", "Resume", "Cancel", "Suspend", "Reinstate", "Revoke"}


def commands(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield every command that has no commands of its own."""
    below = [action for action in root._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield root
    for action in below:
        for child in action.choices.values():
            yield from commands(child)


EXAMPLES = sorted(
    line.strip().removeprefix("qflare-admin ")
    for command in commands(parser())
    for line in (command.epilog or "").splitlines()
    if line.strip().startswith("qflare-admin")
)


def test_every_method_of_the_service_has_a_command() -> None:
    source = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    called = set(re.findall(r'"([A-Z][A-Za-z]+)"', source))
    changed = {f"{word}{what}" for word in CHANGES for what in ("TrainingSession", "Device")}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}
    assert methods - called <= changed


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    words = shlex.split(example.partition(" > ")[0])
    parser().parse_args(words)


def test_every_command_has_an_example() -> None:
    without = [command.prog for command in commands(parser()) if not command.epilog]
    assert without == ["qflare-admin profile show"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no"), 1),
        (InvalidRequestError("no"), 1),
        (ProfileError("no"), 2),
        (FileNotFoundError("no"), 2),
        (UnavailableError("no"), 3),
        (BusyError("no"), 3),
        (AuthenticationError("no"), 4),
        (PermissionDeniedError("no"), 4),
    ],
)
def test_exit_codes_are_those_of_the_page(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_a_profile_without_a_token_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match="profile set"):
        Profile(address="localhost:1").secret()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012, "12.0 ms"), (12.34, "12.3 s"), (250, "4 min 10 s"), (7300, "2 h 1 min")],
)
def test_durations_are_readable(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_readable(value: int, text: str) -> None:
    assert size(value) == text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [pb.Token(token_id="a", subject="first"), pb.Token(token_id="bcd", subject="")]
    columns = [("id", lambda row: row.token_id), ("subject", lambda row: row.subject)]
    assert table(rows, columns) == "id   subject\na    first\nbcd  -"


def test_a_list_without_entries_says_so() -> None:
    assert table([], [("id", lambda row: row)]) == "none"


class Terminal(io.StringIO):
    """A stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def event(kind: str, **fields: object) -> pb.WatchTrainingSessionResponse:
    number = pb.TrainingSessionEventKind.Value(f"TRAINING_SESSION_EVENT_KIND_{kind}")
    message = pb.WatchTrainingSessionResponse(kind=number, **fields)  # type: ignore[arg-type]
    message.training_session.name = "digits"
    message.training_session.state = 2  # type: ignore[assignment]
    message.training_session.config.total_rounds = 5
    message.training_session.config.rounds.target = 4
    return message


def test_a_terminal_shows_a_bar_for_the_round_under_way() -> None:
    stream = Terminal()
    moved = event("ROUND_PROGRESSED")
    moved.round.round_number, moved.round.accepted_count, moved.round.state = 2, 3, 1  # type: ignore[assignment]
    Screen(stream).show(moved)
    assert "round    2/5  [##################......] 3/4 updates  open" in stream.getvalue()


def test_a_file_gets_lines_only() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    moved = event("ROUND_PROGRESSED")
    moved.round.round_number = 2
    screen.show(moved)
    done = event("VERSION_PUBLISHED")
    done.round.round_number, done.global_model.version = 2, 2
    done.global_model.metrics["train_accuracy"] = 0.5
    screen.show(done)
    screen.show(done)
    screen.end()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("round    2  version 2")
    assert line.endswith("train_accuracy=0.5 (training data only)")


def test_a_state_of_a_later_release_is_shown_by_its_number() -> None:
    assert word(device_pb2.Device(state=99), "state") == "unknown (99)"  # type: ignore[arg-type]
