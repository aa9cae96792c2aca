"""docs/migrating.md as a reader types it, in an environment with flwr."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import qflare_client.__main__
import qflare_client.admin.__main__
import qflare_server.cli.main
import qflare_simulation.__main__
from tests.integration.flower.conftest import ROOT, require
from tests.support.manual_pages import run_page

PAGE = ROOT / "docs/migrating.md"
CLIENT = "import sys; from qflare_client.__main__ import main; sys.exit(main())"


def write_program(path: Path, *command: object) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
    path.chmod(0o755)


@pytest.mark.slow
def test_every_block_of_the_page_runs_with_flwr(tmp_path: Path) -> None:
    interpreter = ROOT / ".venv-flower/bin/python"
    require(interpreter)
    programs, folder = tmp_path / "programs", tmp_path / "page"
    programs.mkdir()
    folder.mkdir()
    write_program(programs / "python3", interpreter)
    write_program(programs / "qflare-client", interpreter, "-c", CLIENT)
    write_program(programs / "qflare-server", Path(sys.executable).parent / "qflare-server")

    shown = run_page(PAGE.read_text(), folder, "", programs)

    moved = shown[3]
    assert "not carried over: serverapp server_app:app does not run here" in moved
    assert moved.count("3 updates accepted") == 2


PROGRAMS = {
    "qflare-admin": qflare_client.admin.__main__,
    "qflare-client": qflare_client.__main__,
    "qflare-server": qflare_server.cli.main,
    "qflare-simulate": qflare_simulation.__main__,
}


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`(qflare-[a-z]+ [^`]+)`", PAGE.read_text())))
)
def test_every_command_of_the_tables_exists(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = command.split()
    named = [word for word in words if re.fullmatch("[a-z]+", word)]
    options = [word for word in words if word.startswith("--")]

    with pytest.raises(SystemExit) as done:
        PROGRAMS[program].parser().parse_args([*named, "--help"])

    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert [option for option in options if option not in shown] == []


def test_every_setting_of_the_tables_exists() -> None:
    settings = (ROOT / "docs/training-settings.md").read_text()
    named = re.findall(
        r"`((?:rounds|evaluation|transfer|strategy|device_training)\.\w+)`", PAGE.read_text()
    )

    assert len(named) > 5
    assert [name for name in named if f"`{name}`" not in settings] == []
