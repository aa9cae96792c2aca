"""The `watch` command: follows a training session with a progress bar and a line per finished round.

If standard output is not a terminal, only the lines are printed. The coordinator limits the duration of a watch call;
the command calls again until the training session has ended.
"""

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final, TextIO

from qflare.command_line import seconds as bounded_seconds
from qflare.terminal import printable, say
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_client.admin.arguments import add_command, add_session
from qflare_client.admin.connection import Admin
from qflare_client.admin.output import (
    measured_on,
    notice_lines,
    print_json_line,
    round_of,
    seconds,
    version_metrics,
    word,
)
from qflare_client.errors import UnavailableError

BAR_WIDTH: Final = 24
LEAST_BAR_WIDTH: Final = 6
ATTEMPTS: Final = 10
SHOWN_METRICS: Final = ("accuracy", "loss", "train_accuracy", "train_loss")
ENDED: Final = frozenset(
    {
        training_pb2.TRAINING_SESSION_STATE_COMPLETED,
        training_pb2.TRAINING_SESSION_STATE_CANCELLED,
        training_pb2.TRAINING_SESSION_STATE_FAILED,
    }
)


def add(commands: Any) -> None:
    """Add the command."""
    watch = add_command(
        commands, "watch", run_watch, "follow a training session until it ends", "watch digits"
    )
    add_session(watch)
    watch.add_argument("--for-s", type=bounded_seconds(0), help="maximum time to watch, in seconds")


def run_watch(admin: Admin, options: argparse.Namespace) -> None:
    """Follow a training session until it ends."""
    screen = Screen(sys.stdout)
    for event in events(admin, options.session, options.for_s):
        if options.json:
            print_json_line(event)
        else:
            screen.show(event)
    screen.end()


def events(admin: Admin, session_id: str, for_s: float | None) -> Iterator[Any]:
    """Yield the events of a training session until it ends or the time is over.

    Raises:
        QflareClientError: The coordinator refused, or could not be reached ten times in a row.
    """
    request = pb.WatchTrainingSessionRequest(training_session_id=session_id)
    if for_s is not None:
        request.duration.FromNanoseconds(int(for_s * 1e9))
    failures = 0
    while True:
        over = False
        try:
            for event in admin.receive("WatchTrainingSession", request):
                failures = 0
                over = event.training_session.state in ENDED
                if event.HasField("round"):
                    request.known_round_number = max(0, event.round.round_number - 1)
                yield event
        except UnavailableError as error:
            failures += 1
            if failures > ATTEMPTS or error.retry_after_s is None:
                raise
            threading.Event().wait(max(0.5, error.retry_after_s))
            continue
        if over or for_s is not None:
            return


class Screen:
    """Terminal output: finished lines, and below them the progress bar of the current round."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._published: set[int] = set()
        self._width = 0

    def show(self, event: Any) -> None:
        """Show an event."""
        for line in (self._line(event), *notice_lines(event.notices)):
            if line:
                self._wipe()
                say(printable(line), stream=self._stream)
        if self._live and event.HasField("round"):
            columns = shutil.get_terminal_size().columns
            self._draw(bar(event.training_session, event.round, columns))
        self._stream.flush()

    def end(self) -> None:
        """Erase the progress bar and keep the lines."""
        self._wipe()

    def _line(self, event: Any) -> str:
        kind = event.kind
        if kind == pb.TRAINING_SESSION_EVENT_KIND_SNAPSHOT:
            return header(event) if not self._published else ""
        if kind == pb.TRAINING_SESSION_EVENT_KIND_STATE_CHANGED:
            session = event.training_session
            return f"{word(session, 'state')}: {session.state_reason}".rstrip(": ")
        if kind == pb.TRAINING_SESSION_EVENT_KIND_ROUND_FAILED:
            number, state = event.round.round_number, word(event.round, "state")
            return f"round {number:>4}  {state}: {event.round.state_reason}"
        if kind != pb.TRAINING_SESSION_EVENT_KIND_VERSION_PUBLISHED:
            return ""
        if event.global_model.version in self._published:
            return ""
        self._published.add(event.global_model.version)
        return published(event)

    def _draw(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _wipe(self) -> None:
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def header(event: Any) -> str:
    """Return the first line: name, state and progress of the training session."""
    session = event.training_session
    state = word(session, "state")
    text = f"{session.name}: {state}, round {round_of(session, session.current_round)}"
    if event.HasField("global_model"):
        text += (
            f", version {event.global_model.version} {best(event.global_model.metrics, session)}"
        )
    return text.rstrip()


def bar(session: Any, current: Any, columns: int = 120) -> str:
    """Return the line of the current round, short enough to be redrawn in a terminal of this many columns."""
    target = session.config.rounds.target or session.config.rounds.quorum or 1
    if current.selected_count:
        target = max(session.config.rounds.quorum, min(target, current.selected_count))
    number = round_of(session, current.round_number)
    before = f"round {number:>{5 + len(number.partition('/')[2])}}  ["
    after = f"] {current.accepted_count}/{target} updates  {word(current, 'state')}"
    if session.HasField("best"):
        found = session.best
        after += f"  best {found.metric} {found.value:.4f} ({measured_on(found.source)})"
    width = max(LEAST_BAR_WIDTH, min(BAR_WIDTH, columns - 1 - len(before) - len(after)))
    filled = min(width, width * current.accepted_count // target)
    line = printable(f"{before}{'#' * filled}{'.' * (width - filled)}{after}")
    return line[: columns - 1]


def published(event: Any) -> str:
    """Return the line of a published version."""
    model = event.global_model
    if model.HasField("rollback_version"):
        return f"version {model.version} restores version {model.rollback_version}"
    current = event.round
    taken = (current.close_time.ToNanoseconds() - current.open_time.ToNanoseconds()) / 1e9
    return (
        f"round {current.round_number:>4}  version {model.version:<4}  "
        f"{model.participant_count} updates  collected in {seconds(taken)}, "
        f"published in {seconds(current.publish_duration.ToNanoseconds() / 1e9)}  "
        f"{best(model.metrics, event.training_session)}"
    ).rstrip()


def best(values: Any, session: Any) -> str:
    """Return the metrics that a person looks at first, and a remark where none was measured on held-out data."""
    objective = session.config.objective.metric or SHOWN_METRICS[0]
    wanted = dict.fromkeys((objective, f"train_{objective}", *SHOWN_METRICS))
    shown = {name: values[name] for name in wanted if name in values}
    if not shown:
        return ""
    return version_metrics(shown)
