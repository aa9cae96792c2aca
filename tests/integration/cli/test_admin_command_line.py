"""`qflare-admin` against a real coordinator: from an empty directory to an exported model."""

import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qflare.tensors import Array
from qflare.v1 import verification_pb2
from qflare.v1.device_pb2 import DeviceProfile
from qflare_client import Analytics, Client, TaskKind, TrainingTask, run
from qflare_client.admin.__main__ import main
from qflare_server.use_cases.access.roles import Role
from qflare_simulation import SimulationConfig
from qflare_simulation.__main__ import main as simulator
from qflare_simulation.programs import find, find_data, find_model

Deploy = Callable[..., Any]
Shell = Callable[..., str]


def add_one(
    arrays: dict[str, Array], _config: TrainingTask
) -> tuple[dict[str, Array], int, dict[str, float]]:
    return {name: array + np.float32(1) for name, array in arrays.items()}, 10, {"accuracy": 0.5}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: what a command prints does not depend on it."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a coordinator whose address and admin token stand in the profile."""
    running = deploy()
    token = tmp_path / "admin.token"
    token.touch(0o600)
    token.write_text(running.admin_token)
    monkeypatch.setenv("QFLARE_PROFILE", str(tmp_path / "profile"))
    monkeypatch.delenv("QFLARE_TOKEN", raising=False)
    main(["profile", "set", "--address", running.coordinator.address, "--token-file", str(token)])
    return running


@pytest.fixture
def shell(deployment: Any, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Return a function that runs a command, which must succeed, and returns what it printed."""
    del deployment

    def call(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def finished(deployment: Any, shell: Shell, tmp_path: Path) -> str:
    """Return a training session of two rounds that one device has finished."""
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "initial.safetensors")
    session_id = shell("session", "create", "--name", "digits", "--rounds", 2, "--quorum", 1)
    session_id = session_id.strip()
    shell("model", "upload", session_id, tmp_path / "initial.safetensors")
    shell("session", "start", session_id)
    run(deployment.device("a"), add_one, training_session_id=session_id)
    return session_id


def test_from_nothing_to_an_exported_model(finished: str, shell: Shell, tmp_path: Path) -> None:
    final = tmp_path / "final.safetensors"
    shell("model", "download", finished, final)
    np.testing.assert_array_equal(load_file(final)["w"], np.full(4, 2, np.float32))


def test_a_download_cut_short_leaves_no_file(finished: str, tmp_path: Path) -> None:
    assert main(["model", "download", finished, str(tmp_path / "m"), "--version", "9"]) == 1
    assert not (tmp_path / "m").exists()


def test_tables_are_for_people(finished: str, shell: Shell) -> None:
    listed = shell("session", "list")
    assert listed.splitlines()[0].split()[:2] == ["name", "id"]
    assert finished[:8] in listed
    assert "completed" in listed
    rounds = shell("session", "rounds", finished).splitlines()
    assert len(rounds) == 3
    assert "published" in rounds[1]


def test_json_is_for_programs(finished: str, shell: Shell) -> None:
    answer = json.loads(shell("session", "list", "--json"))
    assert answer["training_sessions"][0]["training_session_id"] == finished
    shown = json.loads(shell("session", "show", finished, "--json"))
    assert shown["training_session"]["state"] == "TRAINING_SESSION_STATE_COMPLETED"


def test_a_watch_prints_a_line_for_every_version(finished: str, shell: Shell) -> None:
    printed = shell("watch", finished)
    assert "completed, round 2/2" in printed


def test_a_watch_follows_a_running_training_session(
    deployment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session_id = deployment.session(rounds={"quorum": 1}, total_rounds=2)
    device = deployment.device("a")
    training = threading.Thread(
        target=run, args=(device, add_one), kwargs={"training_session_id": session_id}
    )
    training.start()
    assert main(["watch", session_id, "--json"]) == 0
    training.join(30)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0]["kind"] == "TRAINING_SESSION_EVENT_KIND_SNAPSHOT"
    assert events[-1]["training_session"]["state"] == "TRAINING_SESSION_STATE_COMPLETED"


def test_versions_and_metrics_are_shown(finished: str, shell: Shell) -> None:
    assert "train_accuracy=0.5" in shell("model", "list", finished)
    shown = shell("model", "show", finished)
    assert "payload digest" in shown
    assert "in-process" in shown
    assert len(shell("metrics", "show", finished).splitlines()) == 4


def test_versions_are_released_and_rolled_back_to(finished: str, shell: Shell) -> None:
    assert "yes" in shell("model", "release", finished, 1)
    assert "restores" in shell("model", "rollback", finished, 1, "--reason", "drift")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_saved(finished: str, shell: Shell, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curve.{suffix}"
    shell("metrics", "plot", finished, path)
    assert path.stat().st_size > 1000


def test_metrics_are_exported_to_tensorboard(finished: str, shell: Shell, tmp_path: Path) -> None:
    shell("metrics", "export", finished, "--tensorboard", tmp_path / "runs")
    (events,) = (tmp_path / "runs").iterdir()
    assert b"train_accuracy" in events.read_bytes()


def test_metrics_are_exported_to_mlflow(
    finished: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    shell("metrics", "export", finished, "--mlflow", uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (stored,) = client.search_runs([client.get_experiment_by_name("qflare").experiment_id])
    assert stored.data.metrics["train_accuracy"] == pytest.approx(0.5)
    assert stored.data.params["rounds.quorum"] == "1"


def test_devices_are_listed_suspended_and_reinstated(deployment: Any, shell: Shell) -> None:
    deployment.device("a", device_type="phone", capabilities={"ram_mib": 4096})
    deployment.device("b", device_type="server", capabilities={"ram_mib": 512})
    listed = json.loads(shell("device", "list", "--capability", "ram_mib>=2048", "--json"))
    (device,) = listed["devices"]
    assert device["profile"]["device_type"] == "phone"
    device_id = device["device_id"]
    assert "suspended" in shell("device", "suspend", device_id, "--reason", "lost")
    assert device_id[:8] in shell("device", "list", "--state", "suspended")
    assert "active" in shell("device", "reinstate", device_id)
    assert "revoked" in shell("device", "revoke", device_id)


def test_devices_are_put_into_groups_and_confirmed(deployment: Any, shell: Shell) -> None:
    client = deployment.device("a", device_type="phone", capabilities={"ram_mib": 512, "cores": 2})
    device_id = client.device_id
    client.heartbeat(DeviceProfile(device_type="server", capabilities={"ram_mib": 4096}))

    assert "trial,ward-3" in shell(
        "device", "set-groups", device_id, "--group", "ward-3", "--group", "trial"
    )
    assert device_id[:8] in shell("device", "list", "--group", "trial")
    shown = json.loads(
        shell("device", "confirm", device_id, "--capability", "ram_mib=1024", "--json")
    )["device"]
    assert shown["profile"]["device_type"] == "phone"
    assert shown["profile"]["capabilities"] == {"ram_mib": 1024, "cores": 2}
    assert shown["reported_type"] == "server"
    shown = json.loads(shell("device", "confirm", device_id, "--reported", "--json"))["device"]
    assert shown["profile"]["device_type"] == "server"
    assert shown["profile"]["capabilities"] == {"ram_mib": 4096}
    shell("device", "set-groups", device_id)
    assert device_id[:8] not in shell("device", "list", "--group", "trial")


def test_devices_go_by_their_names_and_by_the_beginning_of_their_ids(
    deployment: Any, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = deployment.device("ward 3"), deployment.device("ward 3b", label="ward 3")

    listed = shell("device", "list").splitlines()

    assert {line.split()[0] for line in listed} == {"name", "ward-3", "ward-3-2"}
    assert second.device_id in shell("device", "show", "ward-3-2")
    assert first.heartbeat().device_name == "ward-3"
    assert "theatre" in shell("device", "rename", first.device_id[:6], "theatre")
    assert "suspended" in shell("device", "suspend", "theatre", "--reason", "test")
    assert "device:theatre" in shell("audit", "list", "--subject", "device:theatre")
    assert main(["device", "show", "ward-3"]) == 1
    assert "no device with the id or the name 'ward-3'" in capsys.readouterr().err
    assert main(["device", "rename", "theatre", "ward-3-2"]) == 1
    assert "another device has the name 'ward-3-2'" in capsys.readouterr().err


@pytest.mark.usefixtures("deployment")
def test_training_sessions_go_by_their_names_and_by_the_beginning_of_their_ids(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [
        shell("session", "create", "--name", name, "--rounds", "1", "--quorum", "1").strip()
        for name in ("digits", "letters", "letters")
    ]

    assert ids[0] in shell("session", "show", "digits")
    assert ids[1] in shell("session", "show", ids[1][:12])
    assert main(["session", "show", "letters"]) == 2
    said = capsys.readouterr().err
    assert "several training sessions: 'letters' may be letters" in said
    assert ids[1] in said
    assert ids[2] in said
    assert "try: the whole id" in said


def test_tokens_and_training_sessions_are_for_groups(shell: Shell) -> None:
    issued = json.loads(shell("token", "issue", "--group", "ward-3", "--json"))
    assert issued["tokens"][0]["token"]["groups"] == ["ward-3"]
    session = shell(
        "session", "create", "--name", "x", "--quorum", 1, "--group", "b", "--group", "a"
    ).strip()
    assert "a,b" in shell("session", "show", session)


def test_a_long_list_is_put_together_from_pages(deployment: Any, shell: Shell) -> None:
    del deployment
    shell("token", "issue", "--count", 1000)
    shell("token", "issue", "--count", 300)
    everything = json.loads(shell("token", "list", "--limit", 0, "--json"))
    assert len(everything["tokens"]) == 1301
    assert len(shell("token", "list", "--limit", 7).splitlines()) == 8


def test_secrets_go_to_a_file_of_their_owner(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    assert shell("token", "issue", "--count", 3, "--output", path) == ""
    assert len(path.read_text().split()) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_issued_admin_token_works_and_is_revoked(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = json.loads(shell("token", "issue-admin", "--name", "al", "--role", "viewer", "--json"))
    with monkeypatch.context() as patch:
        patch.setenv("QFLARE_TOKEN", issued["token"]["secret"])
        shell("device", "list")
        assert main(["token", "list"]) == 4
    shell("token", "revoke", issued["token"]["token"]["token_id"])
    monkeypatch.setenv("QFLARE_TOKEN", issued["token"]["secret"])
    assert main(["device", "list"]) == 4


def test_a_device_that_lost_its_keys_gets_a_token(deployment: Any, shell: Shell) -> None:
    deployment.device("a")
    device_id = json.loads(shell("device", "list", "--json"))["devices"][0]["device_id"]
    assert shell("device", "rekey", device_id).startswith("qfe1.")


def test_the_audit_log_is_exported_as_json_lines(shell: Shell, tmp_path: Path) -> None:
    shell("token", "issue", "--count", 2)
    assert "token.issued" in shell("audit", "list", "--event", "token.issued")
    lines = shell("audit", "export").splitlines()
    assert all(json.loads(line)["event_type"] for line in lines)
    path = tmp_path / "audit.jsonl"
    shell("audit", "export", "--output", path)
    assert len(path.read_text().splitlines()) == len(lines)


def test_the_state_of_the_coordinator_is_shown(shell: Shell) -> None:
    printed = shell("status")
    assert "latency" in printed
    assert json.loads(shell("status", "--json"))["database"]["dialect"]


def test_a_refusal_gives_its_reason(deployment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    del deployment
    assert main(["session", "show", "none"]) == 1
    assert "TRAINING_SESSION_NOT_FOUND" in capsys.readouterr().err


def test_a_coordinator_that_is_not_there_is_told(
    deployment: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del deployment
    assert main(["--address", "127.0.0.1:1", "status"]) == 3
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_wrong_usage_is_told(deployment: Any) -> None:
    del deployment
    with pytest.raises(SystemExit) as ended:
        main(["session", "dance"])
    assert ended.value.code == 2


def test_a_profile_that_others_can_read_is_refused(
    deployment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del deployment
    (tmp_path / "profile").chmod(0o644)
    assert main(["status"]) == 2
    assert "chmod 600" in capsys.readouterr().err


def test_the_profile_keeps_a_token_to_its_owner(deployment: Any, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "qflare_client.admin", "profile", "set", "--token-stdin"],
        input=deployment.issue_admin(Role.VIEWER),
        text=True,
        check=True,
        capture_output=True,
    )
    path = tmp_path / "profile"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert main(["device", "list"]) == 0


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "tcsh"])
def test_shells_complete_commands(shell: Shell, shell_name: str) -> None:
    assert "rollback" in shell("completion", shell_name)


def test_an_entry_of_the_audit_log_is_proven(shell: Shell) -> None:
    shell("token", "issue")
    entry = json.loads(shell("audit", "list", "--limit", 1, "--json"))["entries"][0]
    proven = json.loads(shell("audit", "proof", entry["audit_id"], "--json"))
    assert proven["entry"]["event_type"] == "token.issued"
    assert "tree size" in shell("audit", "proof", entry["audit_id"])


def test_the_evidence_of_a_version_is_written(finished: str, shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "version-1.bundle"
    shell("model", "evidence", finished, path, "--version", 1)
    bundle = verification_pb2.VerificationBundle.FromString(path.read_bytes())
    assert bundle.version == 1
    assert len(bundle.updates) == 1


def test_a_simulation_s_file_starts_a_real_session(
    deployment: Any, shell: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "digits"
    assert simulator(["init", str(folder)]) == 0
    config = folder / "config.toml"
    kinds = "\n[[simulation.kinds]]\nshare = 0.5\ngroups = ['eu']\n"
    privacy = "\n[simulation.local_privacy]\nclip_norm = 1.0\n"
    config.write_text(config.read_text() + "held_out = 0.2\n" + privacy + kinds)
    simulated = SimulationConfig.read(config)
    save_file(find_model(simulated.model), tmp_path / "initial.safetensors")

    device = deployment.device("a")  # before the round draws its devices
    created = shell(
        *("session", "create", "--name", "digits", "--config", config, "--start"),
        *("--model", tmp_path / "initial.safetensors", "--set", "rounds.quorum=1"),
        *("--set", "rounds.target=1", "--set", "total_rounds=2", "--set", "selection.fraction=1"),
    )
    session_id = created.split()[0]
    data = find_data(simulated)
    train = find(simulated.train, "train")
    run(
        device,
        lambda arrays, task: train(arrays, task, data[0]),
        training_session_id=session_id,
    )

    shown = json.loads(shell("session", "show", session_id, "--json"))["training_session"]
    assert shown["state"] == "TRAINING_SESSION_STATE_COMPLETED"
    assert shown["config"]["device_training"]["batch_size"] == 16
    assert "simulation" not in json.dumps(shown["config"])


def test_a_query_is_asked_answered_and_shown(
    deployment: Any, shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--column", "word", "--kind", "labels", "--label", "yes", "--label", "no")
    asked = (*words, "--min-cohort", 2, "--epsilon", 500, "--unmasked", "--request-id", "once")
    session_id = shell("analytics", "create", "--name", "words", *asked).strip()
    assert shell("analytics", "create", "--name", "words", *asked).strip() == session_id
    assert main(["analytics", "show", "words"]) == 1
    assert "no result yet: the query is running" in capsys.readouterr().err
    policy = Analytics({"word": ["labels"]}, min_cohort=2, max_epsilon=500, allow_unmasked=True)
    for name in "ab":
        deployment.device(name).close()
        with Client(home=deployment.folder / name, analytics=policy) as client:
            task = client.get_task(session_id, answers_queries=True)
            client.answer(task, ["yes", "yes", "yes", "no"])
    shell("watch", session_id)
    found = json.loads(shell("analytics", "show", "words", "--json"))
    assert [row["label"] for row in found["rows"]] == ["yes", "no", "(others)"]
    shares = [row["share"] for row in found["rows"]]
    assert shares == pytest.approx([0.75, 0.25, 0.0], abs=6 * found["noise_deviation"])
    assert (found["answers"], found["epsilon"] <= 500) == (2, True)
    picture = tmp_path / "words.png"
    shown = shell("analytics", "show", "words", "--plot", picture)
    assert shown.splitlines()[0].split() == ["label", "count", "share"]
    assert "2 answers, epsilon" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["analytics", "show", "words", "--plot", "words.txt"]) == 1


def test_a_quantile_is_refined(
    deployment: Any, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second query has bins only where the result of the first says that the quantile lies."""
    policy = Analytics(
        {"age": ["histogram", "quantiles"]},
        min_cohort=2,
        max_epsilon=600,
        max_examples=100,
        allow_unmasked=True,
    )
    ages = np.concatenate([np.full(20, 12.0), np.linspace(55, 58, 80)])
    for name in "ab":
        deployment.device(name).close()

    def answered(session_id: str) -> None:
        for name in "ab":
            with Client(home=deployment.folder / name, analytics=policy) as client:
                client.answer(client.get_task(session_id, answers_queries=True), ages)
        shell("watch", session_id)

    words = ("--column", "age", "--kind", "histogram", "--upper", 100, "--bins", 10)
    asked = (*words, "--max-examples", 100, "--min-cohort", 2, "--epsilon", 600, "--unmasked")
    answered(shell("analytics", "create", "--name", "ages", *asked).strip())
    again = ("--quantile", 0.6, "--epsilon", 600, "--bins", 5, "--request-id", "once")
    refined = shell("analytics", "refine", "ages", "--name", "median", *again).strip()
    capsys.readouterr()
    assert (
        main([str(word) for word in ("analytics", "refine", "ages", "--name", "median", *again)])
        == 0
    )
    shown = capsys.readouterr()
    assert (shown.out.strip(), "between 50 and 60" in shown.err) == (refined, True)
    answered(refined)
    (row,) = json.loads(shell("analytics", "show", "median", "--json"))["rows"]
    assert row["quantile"] == 0.6
    assert row["value"] == pytest.approx(56.5, abs=1.5)
    for refused, told in (
        (("words", "--quantile", 0.6), "no training session"),
        (("ages", "--quantile", 2), "want 0 to 1"),
        (("median", "--quantile", 0.0), "lies below the bound 50"),
    ):
        arguments = ("refine", *refused, "--name", "x", "--epsilon", 1)
        assert main(["analytics", *map(str, arguments)]) == 1
        assert told in capsys.readouterr().err


def test_a_query_in_groups_is_asked_and_refined_with_the_same_groups(
    deployment: Any, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """The noise is small enough for three devices; the refined query keeps how answers are hidden."""
    policy = Analytics(
        {"age": ["histogram", "quantiles"]}, min_cohort=3, max_epsilon=600, max_examples=100
    )
    ages = np.concatenate([np.full(20, 12.0), np.linspace(55, 58, 80)])
    words = ("--column", "age", "--kind", "histogram", "--upper", 100, "--bins", 10)
    bounds = ("--max-examples", 100, "--min-cohort", 3, "--min-answers", 3, "--epsilon", 600)
    groups = ("--neighbors", "--group-size", 3, "--corrupt-fraction", 0.1, "--step-timeout-s", 30)
    session_id = shell("analytics", "create", "--name", "ages", *words, *bounds, *groups).strip()

    def answered(query_id: str) -> None:
        with ExitStack() as stack:
            homes = [deployment.folder / name for name in "abc"]
            clients = [stack.enter_context(Client(home=home, analytics=policy)) for home in homes]
            waiting = list(clients)
            while waiting:
                for client in clients:
                    task = client.get_task(query_id, answers_queries=True)
                    if task.kind is TaskKind.TRAIN:
                        client.answer(task, ages)
                    if task.kind is TaskKind.DONE and client in waiting:
                        waiting.remove(client)

    for name in "abc":
        deployment.device(name).close()
    answered(session_id)
    shown = shell("analytics", "show", "ages")
    assert "groups of at least 3 answers: 1 in the result, 0 aborted; devices: 3 adv" in shown
    assert json.loads(shell("analytics", "show", "ages", "--json"))["neighbors"]["in_sums"] == 3
    again = ("--quantile", 0.6, "--epsilon", 600, "--bins", 5)
    refined = shell("analytics", "refine", "ages", "--name", "median", *again).strip()
    assert "3 to 3 updates in a sum, 32 bits, neighbors in groups of 3" in shell(
        "session", "show", refined
    )
    answered(refined)
    (row,) = json.loads(shell("analytics", "show", "median", "--json"))["rows"]
    assert row["value"] == pytest.approx(56.5, abs=1.5)
    capsys.readouterr()
    wrong = ("analytics", "create", "--name", "x", *words, *bounds, "--unmasked", "--group-size", 3)
    assert main([str(word) for word in wrong]) == 2
    assert "without them, group_size" in capsys.readouterr().err
