"""Signals and arguments of the command-line programs."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.command_line import ArgumentParser, positive

ROOT = Path(__file__).parents[3]
ANYWHERE = """
import os, signal, sys, threading
from qflare.command_line import on_signals

stopped = threading.Event()
on_signals((signal.SIGTERM,), stopped.set)
{body}
"""
LOCK_IS_HELD = """
wait = threading.Condition.wait

def interrupted(self, timeout=None):  # `Event.wait` holds the lock here that `Event.set` needs
    if threading.current_thread() is threading.main_thread():
        os.kill(os.getpid(), signal.SIGTERM)
    return wait(self, timeout)

threading.Condition.wait = interrupted
stopped.wait()
sys.exit(0 if stopped.is_set() else 3)
"""
ANOTHER_THREAD_TAKES_IT = """
def take():
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Timer(0.2, take).start()
stopped.wait()  # nothing wakes the main thread, which alone runs handlers
sys.exit(0 if stopped.is_set() else 3)
"""
SECOND = """
os.kill(os.getpid(), signal.SIGTERM)
stopped.wait()
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(20)
sys.exit(3)
"""
CHILD = """
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"x")  # Python drops signals that come while it forks
    threading.Event().wait()
os.read(reading, 1)
os.kill(child, signal.SIGTERM)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(0 if ended == -signal.SIGTERM and not stopped.wait(0.2) else 3)
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [(LOCK_IS_HELD, 0), (ANOTHER_THREAD_TAKES_IT, 0), (SECOND, 1), (CHILD, 0)],
    ids=["lock", "thread", "second", "child"],
)
def test_a_signal_stops_a_program_whatever_it_interrupts(body: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ANYWHERE.format(body=body)], cwd=ROOT, timeout=30, check=False
    )

    assert done.returncode == code


def test_handlers_stand_where_they_are_known_to_take_no_lock() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("qflare", "qflare_client", "qflare_helper", "qflare_server")
        for path in (ROOT / package).rglob("*.py")
        if "signal.signal(" in path.read_text()
    }

    assert found == {"qflare/command_line.py", "qflare_server/serving/workers.py"}


NOTATIONS = st.sampled_from(["{}", "{:.3e}", "{:.3E}", "{:.4f}", "{:.0f}.", "{:+}"])


@given(st.floats() | st.integers(-(10**20), 10**20), NOTATIONS)
def test_a_number_in_any_notation_is_a_value_of_an_option(number: float, notation: str) -> None:
    text = notation.format(number)
    parser = ArgumentParser()
    parser.add_argument("--lower", type=float)
    parser.add_argument("--verbose", action="store_true")
    for given_to in (parser, _below(parser)):
        found = given_to.parse_args(
            [*(["run"] if given_to is not parser else []), "--lower", text]
        ).lower
        assert repr(found) == repr(float(text))


def _below(parser: ArgumentParser) -> ArgumentParser:
    """Return a parser whose command `run` takes the options of another one."""
    root = ArgumentParser()
    command = root.add_subparsers().add_parser("run", parents=[parser], add_help=False)
    assert isinstance(command, ArgumentParser)
    return root


@pytest.mark.parametrize("text", ["--verbose", "-x", "-e5", "-1x", "--1e5"])
def test_an_unknown_option_is_no_value(text: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--lower")
    with pytest.raises(SystemExit):
        parser.parse_args(["--lower", text])


@pytest.mark.parametrize("text", ["0", "-0.0", "-1", "nan", "inf", "1e999", "x", ""])
def test_a_number_that_is_not_above_zero_is_refused(text: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--delta", type=positive)
    with pytest.raises(SystemExit):
        parser.parse_args(["--delta", text])
