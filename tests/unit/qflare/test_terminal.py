import io
import logging
import subprocess
import sys
import textwrap
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.command_line import ArgumentParser, failure_text
from qflare.terminal import LogFormatter, complain, printable, printable_lines, say

ESC, CSI, BELL, RLO, LRI, ZWSP = "\x1b[2J", "\x9b2J", "\x07", "\u202e", "\u2066", "\u200b"
TEXTS = st.text(st.characters(exclude_categories=()))  # surrogates and all


@given(TEXTS)
def test_only_printable_characters_are_left(text: str) -> None:
    assert printable(text).isprintable()


@given(TEXTS)
def test_what_is_printable_stays_as_it_is(text: str) -> None:
    shown = printable(text)

    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@given(TEXTS)
def test_lines_are_broken_at_line_feeds_alone(text: str) -> None:
    assert [printable(line) for line in text.split("\n")] == printable_lines(text).split("\n")


@pytest.mark.parametrize("char", [chr(number) for number in (*range(32), *range(127, 160))])
def test_every_control_character_is_escaped(char: str) -> None:
    assert unicodedata.category(char) == "Cc"
    assert printable(f"a{char}b") == f"a{char.encode('unicode_escape').decode()}b"


@pytest.mark.parametrize("text", [ESC, CSI, BELL, RLO, LRI, ZWSP, "\u2028", "\ud800", "\ufeff"])
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    assert "\\" in printable(text)


def test_letters_of_all_scripts_are_printed() -> None:
    assert printable("Zürich 東京 δ-привет 🙂") == "Zürich 東京 δ-привет 🙂"


def test_say_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("one", 2, f"three{ESC}\nfour")
    complain(f"five{RLO}")

    printed = capsys.readouterr()
    assert printed.out == "one 2 three\\x1b[2J\nfour\n"
    assert printed.err == "five\\u202e\n"


def test_what_the_locale_cannot_show_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")

    say("Zürich 東京", stream=stream)
    stream.flush()

    assert raw.getvalue() == "Zürich \\u6771\\u4eac\n".encode("latin-1")


def test_a_log_record_is_one_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "got %s", (f"a\nforged{ESC}",), None)

    assert LogFormatter("%(message)s").format(record) == "got a\\nforged\\x1b[2J"


def test_a_logged_traceback_is_printable() -> None:
    with pytest.raises(ValueError, match="evil") as caught:
        int(f"evil{ESC}")
    trace = (caught.type, ValueError(f"evil{ESC}"), caught.tb)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "failed", (), trace)

    lines = LogFormatter("%(message)s").format(record).split("\n")

    assert lines[0] == "failed"
    assert lines[-1] == "ValueError: evil\\x1b[2J"
    assert all(line.isprintable() for line in lines)


def test_a_parser_complains_in_printable_characters(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="p")
    parser.add_subparsers().add_parser("sub")

    with pytest.raises(SystemExit):
        parser.parse_args(["sub", f"--{ESC}"])

    assert "\x1b" not in capsys.readouterr().err


def test_a_failure_is_reported_in_printable_characters() -> None:
    text = failure_text("p", f"cause{ESC}\u2028forged", f"remedy{RLO}")

    assert all(line.isprintable() for line in text.split("\n"))
    assert text.split("\n")[1] == "p: forged"


@pytest.mark.parametrize(
    "module", ["qflare_client", "qflare_client.admin", "qflare_helper", "qflare_server"]
)
def test_an_uncaught_error_is_shown_in_printable_characters(module: str) -> None:
    script = f"""
        import sys
        from {module}.{"cli.main" if module == "qflare_server" else "__main__"} import main
        try:
            main(["--help"])
        except SystemExit:
            pass
        raise RuntimeError("evil\\x1b[2J")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stderr.endswith("RuntimeError: evil\\x1b[2J\n")
