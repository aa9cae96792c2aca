"""The device's policy for secure aggregation from the command line: nothing weaker is trained for or sent."""

import json
import threading
from pathlib import Path

import pytest
from google.protobuf import json_format

from qflare.v1 import training_pb2
from qflare_client.__main__ import main
from tests.integration.secure_aggregation.conftest import SecureDeployment, SecureStart, contribute

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


TRAINING = """
from pathlib import Path

def train(arrays, config):
    Path("trained").touch()
    return dict(arrays), 5, {"loss": 0.5, "accuracy": 0.5}
"""


@pytest.fixture
def made(secure: SecureStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SecureDeployment:
    """A deployment whose enrolled device `a` lies in the working directory, beside a module that trains."""
    running = secure()
    bundle = json_format.MessageToJson(running.deployment.bundle())
    (tmp_path / "bundle.json").write_text(bundle)
    (tmp_path / "secure_training.py").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    assert main(["enroll", "bundle.json", "--home", "a"]) == 0
    return running


def _run(session_id: str, **policy: object) -> int:
    lines = [f"{name} = {json.dumps(value)}" for name, value in policy.items()]
    Path("policy.toml").write_text("\n".join(lines))
    words = ["run", "secure_training:train", "--home", "a", "--training-session", session_id]
    return main([*words, "--secure-aggregation-policy", "policy.toml"])


def test_the_command_trains_for_nothing_weaker_than_its_policy_file(
    made: SecureDeployment, capsys: pytest.CaptureFixture[str]
) -> None:
    helper_id = made.helpers[0].helper_id
    allowed = {"min_cohort": 2, "helper_key_ids": [helper_id], "metrics": ["loss"]}
    masked = made.session(quorum=2)
    plain = made.deployment.session(rounds=training_pb2.RoundPolicy(quorum=1))
    for session_id, changed, told in (
        (plain, {}, "has no secure aggregation"),
        (masked, {"min_cohort": 3}, "allows sums of 2 updates; this device requires 3"),
        (masked, {"helper_key_ids": ["0" * 64]}, "no helper of the task is one"),
        (masked, {"metrics": []}, "metric 'loss', which may not leave"),
        (masked, {"helper_key_ids": []}, "want one or more, or neighbors=True"),
        (masked, {"helper_key_ids": ["0f"]}, "want key ids of 64 hex digits"),
        (masked, {"unknown": 1}, "unknown entry unknown"),
    ):
        assert _run(session_id, **{**allowed, **changed}) == 1
        assert told in capsys.readouterr().err
    assert not Path("trained").exists()

    other = made.deployment.device("other")
    peer = threading.Thread(target=contribute, args=(other, masked, 1))
    peer.start()
    assert _run(masked, **allowed) == 0
    peer.join()
    assert Path("trained").exists()
    assert "1 updates accepted" in capsys.readouterr().out


def test_a_policy_file_that_cannot_be_read_ends_the_command_before_it_connects(
    made: SecureDeployment, capsys: pytest.CaptureFixture[str]
) -> None:
    made.deployment.coordinator.stop(0.1)
    words = ["run", "secure_training:train", "--home", "a", "--patience", "0"]
    assert main([*words, "--secure-aggregation-policy", "absent.toml"]) == 1
    assert "absent.toml" in capsys.readouterr().err
