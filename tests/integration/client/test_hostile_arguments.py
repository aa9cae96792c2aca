"""Whatever is given to a public function of the SDK, what it raises is an error of its own."""

import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import qflare_client
from qflare.v1 import training_pb2
from qflare_client import (
    Analytics,
    Client,
    Evidence,
    InvalidArgumentError,
    LocalPrivacy,
    QflareClientError,
    Receipt,
    RetryPolicy,
    SignedUpdate,
    Task,
    TaskKind,
    Tls,
    TrainingDefaults,
    TrainingFunctionError,
    enroll,
    proximal_gradient,
    run,
)

Deploy = Callable[..., Any]

HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, -(10**400)),
    *(-0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), 1j),
    *("", "x", "\udc80", "\0", "a\nb", "x" * 70_000, b"", b"\xff"),
    *((), [], [1], {}, {1: 2}, {"": 1.0}, {"\udc80": 1.0}, {"\0": "\0"}, {"a": float("nan")}),
    *({"w": None}, {"w": [[1], [1, 2]]}, {"w": 10**400}, set(), object(), object, len, range(3)),
    *(np.int64(-1), np.uint64(2**63), np.float32("nan"), np.bool_(True), np.array([1, 2])),
    *(np.array(1.5), np.array([2], np.uint8).view(np.bool_), np.zeros((3, 0))),
    *(Path("\0"), Path("there is no such file"), datetime.now(UTC), Exception("x")),
]

IMPATIENT = RetryPolicy(total_time_s=0)


def show(value: object) -> str:
    return ascii(value)[:30]


class Stage(NamedTuple):
    """A client with a task in front of it, and another device that no client has opened."""

    client: Client
    task: Task
    session_id: str
    query_id: str
    other_home: Path
    bundle: Any


@pytest.fixture
def stage(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # some of what is hostile is the name of a folder
    deployment = deploy()
    for name in "ab":
        deployment.device(name).close()
    policy = Analytics({"age": ["sum"]}, min_cohort=2, max_epsilon=1.0, allow_unmasked=True)
    client = Client(home=tmp_path / "a", retry=IMPATIENT, analytics=policy)
    query_id = deployment.session(
        {"answer": np.zeros(1, np.float32)},
        rounds=training_pb2.RoundPolicy(quorum=2),
        privacy=training_pb2.PrivacyPolicy(epsilon_budget=1.0),
        analytics=training_pb2.AnalyticsQuery(
            column="age", kind=training_pb2.ANALYTICS_KIND_SUM, upper=9.0, unmasked=True
        ),
    )
    session_id = deployment.session(
        {"w": np.zeros(4, np.float32), "flag": np.zeros(1, np.bool_)},
        rounds=training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=300)),
    )
    pause = threading.Event()
    task = client.get_task(session_id)
    while task.kind is not TaskKind.TRAIN:
        pause.wait(task.poll_delay_s)
        task = client.get_task(session_id)
    with client:
        yield Stage(client, task, session_id, query_id, tmp_path / "b", deployment.bundle())


def strike(function: Callable[..., Any], good: dict[str, Any], *others: type[Exception]) -> None:
    """Call a function with every hostile value in the place of every argument; without a stop, it would not return."""
    errors: tuple[type[Exception], ...] = (QflareClientError, *others)
    assert set(good) == set(inspect.signature(function).parameters), "an argument is not tried"
    for name in good:
        for value in HOSTILE:
            if name == "stop" and value is None:
                continue
            try:
                result = function(**{**good, name: value})
            except errors:
                continue
            if isinstance(result, Client):
                result.close()


def test_calls_of_a_client(stage: Stage) -> None:
    client, task = stage.client, stage.task
    base = client.download_base(task)
    arrays = {"w": np.ones(4), "flag": np.zeros(1, np.bool_)}
    submission = {
        "task": task,
        "base": base,
        "arrays": arrays,
        "example_count": 1,
        "metrics": {},
        "privacy": None,
        "timeout_s": None,
    }
    work = {"task": task, "example_count": 1, "metrics": {"loss": 1.0}, "timeout_s": None}
    session = {"training_session_id": stage.session_id}
    strike(client.submit, submission)
    strike(
        client.sign_update, {name: submission[name] for name in submission if name != "timeout_s"}
    )
    update = client.sign_update(task, base, arrays, 1)
    strike(client.submit_all, {"updates": [update], "timeout_s": None})
    strike(SignedUpdate.from_bytes, {"data": update.to_bytes()})
    strike(client.report_evaluation, work)
    failure = {"task": task, "kind": "OutOfMemory", "text": "", "timeout_s": None}
    strike(client.report_failure, failure)
    strike(client.send_kept, {"task": None, "timeout_s": None})
    strike(
        client.get_task,
        {
            **session,
            "trains_only": False,
            "answers_queries": True,
            "takes_steps": True,
            "timeout_s": None,
        },
    )
    strike(client.take_step, {"task": task})
    strike(client.download_base, {"task": task, "timeout_s": None})
    strike(client.require_release, {"task": task, "privacy": LocalPrivacy(1.0)})
    strike(client.privacy_epsilon, {"delta": 1e-5})
    strike(
        client.download,
        {**session, "version": 0, "released": False, "encoding": base.encoding, "timeout_s": None},
    )
    strike(client.lineage, {**session, "first_version": 0, "last_version": None, "timeout_s": None})
    strike(client.evidence, {**session, "receipts": ()})
    strike(client.audit_head, {"timeout_s": None})
    strike(client.local_tensors, session)
    strike(client.find_session, {"reference": stage.session_id[:8], "timeout_s": None})
    strike(client.tasks, {**session, "stop": None, "patience_s": 1.0})
    strike(client.rotate_keys, {"algorithm": None})
    strike(base.save, {"path": Path("/nowhere/model.safetensors")}, OSError)


def test_answers(stage: Stage) -> None:
    """A query is created for the same device; what is given for its values ends in an error of the SDK or an answer."""
    task = stage.client.get_task(stage.query_id, answers_queries=True)
    strike(stage.client.require_query, {"task": task})
    strike(stage.client.answer, {"task": task, "values": [1.0], "timeout_s": None})
    assert stage.client.analytics_epsilon() == 1.0


def test_heartbeats_and_proofs(stage: Stage) -> None:
    client, task = stage.client, stage.task
    base = client.download_base(task)
    receipt = client.submit(task, base, dict(base.arrays), 1)
    assert isinstance(receipt, Receipt)
    parts = ("profile", "device_type", "capabilities", "hardware_info", "network_info", "timeout_s")
    strike(client.heartbeat, dict.fromkeys(parts))
    strike(client.contribution_proof, {"receipt": receipt, "timeout_s": None})


def test_opening_and_enrolling(stage: Stage) -> None:
    signature = inspect.signature(Client).parameters
    good = {name: parameter.default for name, parameter in signature.items()}
    strike(Client, {**good, "home": stage.other_home, "retry": IMPATIENT})

    signature = inspect.signature(enroll).parameters
    good = {name: parameter.default for name, parameter in signature.items()}
    good |= {"bundle": stage.bundle, "home": stage.other_home, "retry": IMPATIENT}
    strike(enroll, good)


def test_values_of_the_sdk() -> None:
    weights = {"w": np.ones(3)}
    strike(LocalPrivacy, dict.fromkeys(("clip_norm", "noise_multiplier"), 1.0) | {
        "max_epsilon": None, "delta": 1e-5,
    }, ValueError)  # fmt: skip
    strike(RetryPolicy, dict.fromkeys(("total_time_s", "initial_delay_s", "max_delay_s"), 1.0))
    strike(TrainingDefaults, {"local_epochs": 1, "batch_size": 1, "learning_rate": 1.0})
    strike(Tls.from_files, {
        "ca_file": None, "certificate_file": None, "key_file": None, "server_name": "",
    }, OSError)  # fmt: skip
    policy = {"columns": {"age": ["sum"]}, "min_cohort": 2, "max_epsilon": 1.0, "max_delta": 1e-5}
    rest = {"budget": 9.0, "max_examples": 1, "allow_unmasked": False}
    strike(Analytics, policy | rest)
    strike(Analytics.from_file, {"path": Path("there is no such file")})
    strike(proximal_gradient, {"weights": weights, "base": weights, "mu": 0.5})
    strike(Evidence.from_json, {"text": "{}"})
    strike(LocalPrivacy(1.0).protect, {
        "weights": weights, "base": weights, "generator": None,
    }, ValueError)  # fmt: skip


def test_the_loop(stage: Stage) -> None:
    ended = threading.Event()
    ended.set()
    good = {
        "client": stage.client,
        "train": lambda arrays, config: (arrays, 1, {}),  # noqa: ARG005
        "evaluate": None,
        "training_session_id": stage.session_id,
        "stop": ended,
        "patience_s": 1.0,
        "privacy": None,
        "on_receipt": None,
        "on_failure": "stop",
        "analytics": {"age": lambda query: [1.0]},  # noqa: ARG005
    }
    strike(run, good)


def test_what_training_returns(stage: Stage) -> None:
    """Alone, in the place of the arrays, and what is right in the wrong order."""
    arrays = {"w": np.ones(4, np.float32), "flag": np.zeros(1, np.bool_)}
    results: list[Any] = [*HOSTILE, *((value, 1, {}) for value in HOSTILE)]
    for result in [*results, (arrays, {}, 1), (1, arrays, {}), (1, {}, arrays), [arrays]]:
        with pytest.raises(TrainingFunctionError):
            run(
                stage.client,
                partial(returned, result),
                training_session_id=stage.session_id,
                patience_s=5.0,
            )


def returned(result: Any, arrays: Any, config: Any) -> Any:
    """Return a result, whatever the arrays: a training function once the result is bound."""
    del arrays, config
    return result


def test_all_public_names_are_tried() -> None:
    """A function that becomes public has to be added here."""
    functions = {
        name for name in qflare_client.__all__ if inspect.isfunction(getattr(qflare_client, name))
    }
    assert functions == {"enroll", "run", "proximal_gradient"}
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if name[0] != "_"}
    assert methods - {"close"} == {
        *("submit", "report_evaluation", "send_kept", "get_task", "download_base", "download"),
        *("require_release", "privacy_epsilon", "lineage", "evidence", "audit_head"),
        *("rotate_keys", "heartbeat", "contribution_proof", "report_failure", "local_tensors"),
        *("sign_update", "submit_all", "tasks", "answer", "require_query", "analytics_epsilon"),
        *("find_session", "take_step"),
    }


def test_a_mistake_names_argument_and_value(stage: Stage) -> None:
    with pytest.raises(InvalidArgumentError, match="first_version: got -1, want an integer"):
        stage.client.lineage(stage.session_id, -1)
    with pytest.raises(InvalidArgumentError, match="training_session_id: got 7, want a str"):
        stage.client.get_task(7)  # type: ignore[arg-type]
