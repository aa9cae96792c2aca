"""Help texts of the three programs: every example in them can be typed, and every command tells its version."""

import argparse
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qflare
import qflare_client.__main__ as client_program
import qflare_client.admin.__main__ as admin_program
from qflare_server.cli import main as server_program

PARSERS = {
    "qflare-server": server_program.parser,
    "qflare-client": client_program.parser,
    "qflare-admin": admin_program.parser,
}
MAINS = {
    "qflare-server": server_program.main,
    "qflare-client": client_program.main,
    "qflare-admin": admin_program.main,
}


def parsers(root: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of all its commands."""
    yield root
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for parser in action.choices.values():
                yield from parsers(parser)


def examples() -> Iterator[str]:
    """Yield every line of a help text that begins with one of the programs, or with a variable before it."""
    for make in PARSERS.values():
        for parser in parsers(make()):
            for line in (parser.epilog or "").splitlines():
                # What stands two or more spaces after a command explains it.
                words = re.split(r"\s{2,}", line.strip().removeprefix("example: "))[0].split()
                while words and words[0].startswith("QFLARE_"):
                    words.pop(0)
                if words and words[0] in PARSERS:
                    yield " ".join(words)


@pytest.mark.parametrize("example", sorted(set(examples())))
def test_an_example_can_be_typed(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mytraining.py").write_text("def train(): ...\ndef evaluate(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    command, _, _ = example.partition(" > ")
    program, *words = shlex.split(command.replace("...", "localhost/x"))
    words = [word.replace("5f0clocalhost/x", "5f" * 32) for word in words]

    PARSERS[program]().parse_args(words)


@pytest.mark.parametrize("program", MAINS)
def test_every_program_tells_its_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        MAINS[program](["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{qflare.__version__}\n"


def test_the_table_of_commands_names_them_all() -> None:
    (commands,) = [
        action
        for action in server_program.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]

    assert list(commands.choices) == list(server_program.COMMANDS)
    for name, module in server_program.COMMANDS.items():
        (alone,) = [
            action
            for action in server_program.parser([module])._actions
            if isinstance(action, argparse._SubParsersAction)
        ]
        assert name in alone.choices


HEAVY = {"alembic", "numpy", "sqlalchemy", "qflare_server.use_cases", "qflare_server.storage"}


def test_a_probe_loads_neither_the_database_nor_numpy() -> None:
    code = (
        "import sys; from qflare_server.cli.main import main;"
        " code = main(['health', '--address', '127.0.0.1:1', '--timeout', '0.2']);"
        " print(code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    code_of_health, *loaded = done.stdout.split()
    assert code_of_health == "1"
    assert HEAVY & set(loaded) == set()


@pytest.mark.slow
def test_a_probe_costs_less_than_a_third_of_a_second_of_cpu() -> None:
    command = [sys.executable, "-m", "qflare_server", "health", "--address", "127.0.0.1:1"]
    costs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, timeout=60, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(costs) < 0.3
