"""`qflare-simulate` as a person uses it: from nothing to a picture in two commands."""

import io
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from safetensors.numpy import load_file

from qflare_simulation.__main__ import main
from qflare_simulation.terminal import Progress


def tracked(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each metric of the one run that MLflow's own client reads."""
    client = mlflow.MlflowClient(tracking_uri=str(folder))
    experiment = client.get_experiment_by_name("qflare")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"strategy": "fedavg", "devices": "30"}
    return {
        name: [item.step for item in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def test_an_example_runs_as_it_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "digits"
    assert main(["init", str(folder)]) == 0
    assert f"qflare-simulate run {folder / 'config.toml'}" in capfd.readouterr().out
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("total_rounds = 20", "total_rounds = 3"))
    outputs = ["--plot", tmp_path / "curves.png", "--model", tmp_path / "final.safetensors"]
    outputs += ["--export", tmp_path / "tables", "--format", "parquet"]
    outputs += ["--tensorboard", tmp_path / "events", "--mlflow", tmp_path / "mlruns"]

    code = main(["run", str(config), "--devices", "30", "--workers", "-1", *map(str, outputs)])

    said, complained = capfd.readouterr()
    assert code == 0, complained
    assert "completed at version 3" in said
    assert load_file(tmp_path / "final.safetensors")["weight"].shape == (64, 10)
    assert (tmp_path / "curves.png").exists()
    assert len(list((tmp_path / "tables").glob("*.parquet"))) == 6
    assert tracked(tmp_path / "mlruns")["test_accuracy"] == [0, 1, 2, 3]

    other = folder / "median.toml"
    other.write_text(config.read_text().replace("fedavg", "median"))
    picture = tmp_path / "both.png"
    assert (
        main(["compare", str(config), str(other), "--workers", "-1", "--plot", str(picture)]) == 0
    )
    said, _ = capfd.readouterr()
    assert "config: test_accuracy 0." in said
    assert "median: test_accuracy 0." in said
    assert picture.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_rounds = ", "qflare-simulate: "),
        ("[simulation]\ndata = 'mnist'\n", "want PATH:FUNCTION"),
        ("[simulation]\ntrain = 'none.py:train'\n", "no file"),
        ("[simulation]\nmodel = 'none.safetensors'\n", "none.safetensors"),
        ("[simulation]\nunknown = 1\n", "no setting simulation.unknown"),
    ],
)
def test_a_mistake_is_said_with_its_remedy(
    text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text(text)

    code = main(["run", str(tmp_path / "config.toml")])

    said = capfd.readouterr().err
    assert code == 1
    assert message in said
    assert "try: " in said
    assert "Traceback" not in said


def test_a_folder_that_is_not_empty_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()

    assert main(["init", str(tmp_path)]) == 1
    assert "is not empty" in capfd.readouterr().err


class Terminal(io.StringIO):
    """Text that a terminal would show."""

    def isatty(self) -> bool:
        """Return that this is a terminal."""
        return True


def test_progress_is_one_line_of_a_terminal_and_nothing_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress("digits\x1b[2J", stream)
        progress(5, 10, 3, 8)
        progress.close()

    shown = terminal.getvalue()
    assert f"[{'=' * 15}{' ' * 15}] 5/10, 3/8 updates" in shown
    assert "\x1b" not in shown
    assert "\n" not in shown
    assert shown.endswith(" \r")
    assert file.getvalue() == ""


NOTEBOOK = """
import numpy as np
from qflare_simulation import simulate

def train(arrays, task, data):
    return {name: array + np.float32(data) for name, array in arrays.items()}, 1, {"loss": 1.0}

history = simulate(train, [1, 1, 1], {"total_rounds": 2, "rounds.quorum": 3, "simulation": {"workers": 2}},
                   model={"weight": np.zeros(2, np.float32)})
print(history.to_pandas("rounds")["accepted"].tolist(), history.model["weight"].tolist())
"""


def test_functions_that_were_typed_into_a_session_are_simulated_in_processes() -> None:
    typed = "import code; code.InteractiveConsole().runcode(compile(__import__('sys').argv[1], 'cell', 'exec'))"

    done = subprocess.run(
        [sys.executable, "-c", typed, NOTEBOOK], capture_output=True, text=True, check=True
    )

    assert done.stdout.split("\n")[0] == "[3, 3] [2.0, 2.0]", done.stderr
