"""`session validate` and `session create` of both programs: nothing is left behind by what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import qflare_client.admin.__main__ as admin_program
from qflare.v1 import admin_service_pb2 as pb
from qflare_server.cli import main as server_program
from tests.integration.conftest import Deployment

Run = Callable[..., int]
PRIVATE = ["--set", "privacy.noise_multiplier=1", "--set", "privacy.clip_norm=1"]


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture(params=["qflare-server", "qflare-admin"])
def run(request: pytest.FixtureRequest, deployment: Deployment, tmp_path: Path) -> Run:
    """Return a function that runs a command of one of the two programs on the coordinator."""
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "good.safetensors")
    save_file({"w": np.ones(4, np.float64)}, tmp_path / "wide.safetensors")
    save_file({"w": np.full(4, np.nan, np.float32)}, tmp_path / "nan.safetensors")
    save_file({"w": np.ones(4, np.int32)}, tmp_path / "integers.safetensors")
    config = deployment.coordinator.parts.context.config
    if request.param == "qflare-server":
        words = ["--data-dir", str(config.data_dir), "--database-url", config.database_url]
        return lambda *rest: server_program.main([*words, "session", *rest])
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(deployment.admin_token)
    words = ["--address", deployment.coordinator.address, "--token-file", str(token)]
    return lambda *rest: admin_program.main([*words, "session", *rest])


def sessions(deployment: Deployment) -> list[tuple[str, int]]:
    """Return name and state of every training session."""
    answer = deployment.admin.ListTrainingSessions(
        pb.ListTrainingSessionsRequest(), metadata=deployment.metadata
    )
    return [(row.name, row.state) for row in answer.training_sessions]


def test_validate_prints_every_default_and_creates_nothing(
    run: Run, deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "rounds.quorum=3", "--set", "strategy.name=trimmed_mean"]

    assert run("validate", *words, "--model", str(tmp_path / "good.safetensors")) == 0

    printed = capsys.readouterr()
    config = json.loads(printed.out)
    assert config["rounds"]["quorum"] == 3
    assert config["rounds"]["deadline"] == "600s"
    assert config["strategy"]["name"] == "trimmed_mean"
    assert "warning: " in printed.err, "a trimmed mean of three updates trims nothing"
    assert sessions(deployment) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "rounds.quorum=-1"],
        ["--set", "rounds.quorum=5", "--set", "rounds.target=3"],
        ["--set", "rounds.quorm=3"],
        ["--set", "strategy.name=fedbest"],
        ["--set", "early_stop.metric=accuracy"],
        [*PRIVATE, "--model", "wide.safetensors"],
        ["--model", "integers.safetensors"],
        ["--model", "nan.safetensors"],
        ["--model", "absent.safetensors"],
        ["--model", "text.safetensors"],
    ],
    ids=" ".join,
)
def test_what_is_refused_leaves_no_session_that_waits(
    run: Run,
    deployment: Deployment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    words = [str(tmp_path / word) if word.endswith(".safetensors") else word for word in words]
    needs_bytes = "nan" in words[-1]

    if not needs_bytes:
        assert run("validate", *words) != 0
    if "--model" not in words:
        words += ["--model", str(tmp_path / "good.safetensors")]
    assert run("create", "--name", "x", "--quorum", "2", *words, "--start") != 0

    assert "try: " in capsys.readouterr().err
    assert {state for _, state in sessions(deployment)} <= {5}, "cancelled, if created at all"
    if not needs_bytes:
        assert sessions(deployment) == []


def test_one_command_creates_a_session_with_its_model_and_starts_it(
    run: Run, deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "session.toml").write_text("total_rounds = 4\n[rounds]\nquorum = 2\n")

    words = ["--config", str(tmp_path / "session.toml"), "--set", "total_rounds=5"]
    model = str(tmp_path / "good.safetensors")
    assert run("create", "--name", "wards", *words, "--model", model, "--start") == 0

    session_id = capsys.readouterr().out.split()[-1]
    found = deployment.admin.GetTrainingSession(
        pb.GetTrainingSessionRequest(training_session_id=session_id), metadata=deployment.metadata
    ).training_session
    assert (found.name, found.state, found.current_version) == ("wards", 2, 0)
    assert (found.config.total_rounds, found.config.rounds.quorum) == (5, 2)
