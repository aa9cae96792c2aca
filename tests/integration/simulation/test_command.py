"""`qflare-simulate` as a person uses it: from nothing to a picture in two commands."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from qflare_simulation.__main__ import main


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
    assert any((tmp_path / "mlruns").iterdir())

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
