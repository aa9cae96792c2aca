"""What an app meets on a device, with each version of flwr; and what is said without it."""

from pathlib import Path

import pytest

from qflare_client.__main__ import main
from qflare_client.flower import MissingFlowerError, flower_device
from tests.integration.flower.conftest import HERE, Run, finished

APP = '[tool.flwr.app.components]\nclientapp = "client_app:app"\n'


def test_an_app_meets_the_same_with_each_version(interpreter: Path, start: Run) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--noconftest"]

    said = finished(start(interpreter, "-m", "pytest", *options, HERE / "in_flower.py"))

    assert " passed" in said


def test_without_flwr_the_remedy_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text(APP)

    with pytest.raises(MissingFlowerError):
        flower_device(tmp_path)
    assert main(["run", "--flower-app", str(tmp_path), "--home", str(tmp_path / "home")]) == 1
    assert "pip install 'qflare[flower]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "json:loads", "--flower-app", "."],
        ["run", "--flower-app", ".", "--node-config", "partition-id"],
        ["run", "--flower-app", ".", "--run-config", "mode=fast"],
    ],
)
def test_a_wrong_use_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)

    assert "qflare-client run: " in capsys.readouterr().err


def test_options_of_a_flower_app_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "json:loads", "--node-config", "partition-id=1"]) == 1

    assert "--flower-app" in capsys.readouterr().err
