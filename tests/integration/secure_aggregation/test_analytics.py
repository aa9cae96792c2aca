"""Federated analytics: queries from real administrators to real devices, masked by a real helper."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import pytest

from qflare.analytics.queries import KINDS
from qflare.evidence.verification import verify_bundle
from qflare.v1 import admin_service_pb2, training_pb2, verification_pb2
from qflare_client import (
    Analytics,
    Client,
    FailedPreconditionError,
    InsufficientTaskError,
    InvalidArgumentError,
    InvalidRequestError,
    PrivacyBudgetExceededError,
    Query,
    SecureAggregation,
    TaskKind,
    TrainingFunctionError,
    enroll,
    run,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.profile import Profile
from qflare_client.admin.queries import create_query, read_result
from qflare_client.admin.transfers import upload_model
from qflare_server.context import utc_now
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import audit
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.verification.recomputation import recompute_version
from tests.integration.secure_aggregation.conftest import (
    SecureDeployment,
    SecureStart,
    wait_for_version,
)

DEVICES: Final = 4
EPSILON: Final = 600.0
"""So much that the noise is far below a value, and results can be compared."""

ALL: Final = dict.fromkeys(("age", "word"), frozenset(KINDS))
POLICY: Final = Analytics(columns=ALL, min_cohort=2, max_epsilon=EPSILON, max_examples=20)


def config_of(
    made: SecureDeployment, question: dict[str, Any], *, is_masked: bool = True, **config: Any
) -> training_pb2.TrainingConfig:
    """Return the configuration of a query to all devices."""
    config.setdefault("rounds", {"quorum": DEVICES})
    config.setdefault("privacy", {"epsilon_budget": EPSILON})
    helpers = [helper.helper_id for helper in made.helpers]
    if is_masked:
        mode = training_pb2.SECURE_AGGREGATION_MODE_HELPER
        config.setdefault("secure_aggregation", {"mode": mode, "helpers": helpers})
    asked = {"max_examples": 20, "unmasked": not is_masked, **question}
    query = training_pb2.AnalyticsQuery(**asked)
    return training_pb2.TrainingConfig(analytics=query, **config)


@contextmanager
def administrator(made: SecureDeployment) -> Iterator[Admin]:
    deployment = made.deployment
    profile = Profile(deployment.coordinator.address, token=deployment.admin_token)
    with Admin(profile) as admin:
        yield admin


def device(made: SecureDeployment, name: str, stack: ExitStack, **settings: Any) -> Client:
    """Enroll a device and return its client with its own policies."""
    home = made.deployment.folder / name
    enroll(made.deployment.bundle(label=name), home=home)
    return stack.enter_context(Client(home=home, **{"analytics": POLICY, **settings}))


def answer_all(clients: list[Client], session_id: str, values: list[Any]) -> None:
    for client, own in zip(clients, values, strict=True):
        task = client.get_task(session_id, answers_queries=True)
        assert task.analytics is not None
        client.answer(task, own)
    wait_for_version(clients[0], session_id, 1)


AGES: Final = [np.arange(20, 20 + 5 * count) % 97 for count in range(1, DEVICES + 1)]
WHOLE: Final = np.concatenate(AGES)
WORDS: Final = [["yes"] * count + ["no"] * 2 + ["what"] for count in range(1, DEVICES + 1)]
AGE: Final = {"column": "age", "lower": 0.0, "upper": 100.0}


def test_every_kind_of_query_over_masked_answers(secure: SecureStart) -> None:
    """One deployment and the same devices: the results are those of all values together, up to the noise."""
    made = secure()
    with ExitStack() as stack, administrator(made) as admin:
        clients = [device(made, f"device-{index}", stack) for index in range(DEVICES)]

        def result(kind: str, values: list[Any], **question: Any) -> tuple[list[Any], float]:
            asked = {"kind": KINDS[kind], **question}
            session = create_query(admin, kind, config_of(made, asked))
            answer_all(clients, session.training_session_id, values)
            found = read_result(admin, session.training_session_id)
            assert found.version.participant_count == DEVICES
            assert 0 < found.version.epsilon <= EPSILON
            return list(found.result.rows), 6 * found.result.error

        rows, bound = result("count", AGES, column="age")
        assert rows[0][0] == pytest.approx(len(WHOLE), abs=bound)
        rows, bound = result("sum", AGES, **AGE)
        assert rows[0][0] == pytest.approx(WHOLE.sum(), abs=bound)
        rows, bound = result("mean", AGES, **AGE)
        assert rows[0][0] == pytest.approx(len(WHOLE), abs=bound)
        assert rows[0][1] == pytest.approx(WHOLE.mean(), abs=100 * bound / len(WHOLE))
        assert rows[0][2] == pytest.approx(WHOLE.var(), abs=5000 * bound / len(WHOLE))
        rows, bound = result("histogram", AGES, **AGE, bins=10)
        wanted = [0, *np.histogram(WHOLE, 10, (0, 100))[0], 0]
        assert [row[2] for row in rows] == pytest.approx(wanted, abs=bound)
        rows, bound = result("quantiles", AGES, **AGE, quantiles=[0.5])
        assert rows[0][1] == pytest.approx(np.median(WHOLE), abs=10)
        rows, bound = result("labels", WORDS, column="word", labels=["yes", "no"])
        assert [row[0] for row in rows] == ["yes", "no", "(others)"]
        assert [row[1] for row in rows] == pytest.approx([10, 8, 4], abs=bound)


def test_a_result_is_signed_recomputed_and_in_the_audit_log(secure: SecureStart) -> None:
    made = secure()
    with ExitStack() as stack, administrator(made) as admin:
        clients = [device(made, f"device-{index}", stack) for index in range(DEVICES)]
        config = config_of(made, {"kind": KINDS["histogram"], **AGE})
        session_id = create_query(admin, "ages", config).training_session_id
        answer_all(clients, session_id, AGES)
        assert all(client.analytics_epsilon() == EPSILON for client in clients)
        assert read_result(admin, session_id).session.state == (
            training_pb2.TRAINING_SESSION_STATE_COMPLETED
        )
    parts = made.deployment.coordinator.parts
    found = recompute_version(parts.context, session_id, 1)
    assert (found.recomputed, found.differences) == (True, ())
    bundle = verification_pb2.VerificationBundle()
    for part in parts.use_cases.evidence.bundle(session_id):
        bundle.MergeFrom(part)
    verified = verify_bundle(bundle, parts.keys.trust.root_key_ids(), utc_now())
    assert verified.helper_ids == (made.helpers[0].helper_id,)
    with parts.context.database.read() as session:
        entries = audit.list_entries(session, PageRequest(100), AuditFilter()).rows
    events = {entry.event_type: entry for entry in entries if session_id in entry.subject}
    assert {"training_session.created", "round.unmasked", "version.published"} <= events.keys()


def test_devices_answer_in_the_loop_and_others_never_see_the_query(secure: SecureStart) -> None:
    """A device without a policy goes on training; one that refuses a query is not kept from other work by it."""
    made = secure()
    trained: list[str] = []

    def train(arrays: dict[str, Any], task: Any) -> tuple[dict[str, Any], int, dict[str, float]]:
        trained.append(task.training_session_id)
        return arrays, 1, {"loss": 0.5}

    with ExitStack() as stack, administrator(made) as admin:
        clients = [device(made, f"device-{index}", stack) for index in range(2)]
        strict = Analytics(columns=ALL, min_cohort=3, max_epsilon=EPSILON, max_examples=20)
        refusing = device(made, "refusing", stack, analytics=strict)
        without = device(made, "without", stack, analytics=None)
        config = config_of(made, {"kind": KINDS["sum"], **AGE}, rounds={"quorum": 2})
        query_id = create_query(admin, "ages", config).training_session_id
        assert without.get_task(query_id).kind is TaskKind.WAIT
        assert without.get_task().kind is TaskKind.WAIT
        training_id = made.session(quorum=2, policy={"metrics": []})
        summaries = {}

        def take_part(client: Client, name: str, session_id: str, **settings: Any) -> None:
            stop = threading.Event()
            summaries[name] = run(
                client,
                train,
                training_session_id=session_id,
                stop=stop,
                on_receipt=lambda _: stop.set(),
                **settings,
            )

        take_part(without, "without", training_id)
        asked: list[Any] = []

        def ages(query: Query) -> Any:
            asked.append(query.column)
            return AGES[len(asked)]

        # Without a training session a device gets any task: the query first, which it refuses.
        take_part(refusing, "refusing", None, analytics={"age": ages})  # type: ignore[arg-type]
        assert summaries["refusing"].refused_query_count == 1
        assert (summaries["refusing"].update_count, asked) == (1, [])
        assert trained == [training_id, training_id]
        for index, client in enumerate(clients):
            take_part(client, f"{index}", query_id, analytics={"age": ages})
        assert [summaries[name].answer_count for name in "01"] == [1, 1]
        assert asked == ["age", "age"]
        wait_for_version(clients[0], query_id, 1)
        assert len(read_result(admin, query_id).result.rows) == 1
        assert clients[0].get_task(query_id, answers_queries=True).kind is TaskKind.DONE


def test_a_device_refuses_what_its_policies_do_not_allow(secure: SecureStart) -> None:
    made = secure()
    with ExitStack() as stack, administrator(made) as admin:
        config = config_of(made, {"kind": KINDS["sum"], **AGE})
        session_id = create_query(admin, "ages", config).training_session_id
        open_config = config_of(made, {"kind": KINDS["sum"], **AGE}, is_masked=False)
        open_id = create_query(admin, "open", open_config).training_session_id
        device(made, "device", stack).close()

        def attempt(asked_id: str, secure_policy: Any = None, **policy: Any) -> Exception | None:
            values: dict[str, Any] = {
                "columns": ALL,
                "min_cohort": DEVICES,
                "max_epsilon": EPSILON,
                "max_examples": 20,
                **policy,
            }
            settings = {"analytics": Analytics(**values), "secure_aggregation": secure_policy}
            with Client(home=made.deployment.folder / "device", **settings) as client:
                task = client.get_task(asked_id, answers_queries=True)
                try:
                    client.answer(task, [1.0, 2.0])
                except (InsufficientTaskError, PrivacyBudgetExceededError) as error:
                    return error
                return None

        for policy in (
            {"columns": {"age": ["count"]}},
            {"columns": {"height": ["sum"]}},
            {"min_cohort": DEVICES + 1},
            {"max_epsilon": EPSILON - 1},
            {"max_delta": 1e-7},
            {"max_examples": 19},
        ):
            assert isinstance(attempt(session_id, **policy), InsufficientTaskError), policy
        assert isinstance(attempt(session_id, budget=1.0), PrivacyBudgetExceededError)
        other = SecureAggregation(min_cohort=2, helper_key_ids={"0" * 64})
        assert isinstance(attempt(session_id, other), InsufficientTaskError)
        assert isinstance(attempt(open_id), InsufficientTaskError)
        own = SecureAggregation(min_cohort=2, helper_key_ids={made.helpers[0].helper_id})
        assert isinstance(attempt(open_id, own, allow_unmasked=True), InsufficientTaskError)
        assert attempt(open_id, allow_unmasked=True) is None
        # The budget counts what was answered before a restart, and an answered round once.
        assert isinstance(attempt(session_id, own, budget=EPSILON), PrivacyBudgetExceededError)
        assert attempt(session_id, own, budget=2 * EPSILON) is None


def test_queries_are_for_answers_and_tasks_for_training(secure: SecureStart) -> None:
    made = secure()
    with ExitStack() as stack, administrator(made) as admin:
        config = config_of(made, {"kind": KINDS["sum"], **AGE})
        session_id = create_query(admin, "ages", config).training_session_id
        client = device(made, "device", stack)
        task = client.get_task(session_id, answers_queries=True)
        base = client.download_base(task)
        with pytest.raises(InvalidArgumentError, match=r"Client\.answer"):
            client.submit(task, base, base.arrays, 1)
        with pytest.raises(InvalidArgumentError, match=r"Client\.answer"):
            client.sign_update(task, base, base.arrays, 1)
        with pytest.raises(TrainingFunctionError, match="want numbers"):
            client.answer(task, ["a"])
        training_id = made.session(quorum=2)
        with pytest.raises(InvalidArgumentError, match="no query"):
            client.answer(client.get_task(training_id), [1.0])


REFUSED: Final[list[tuple[str, dict[str, Any], dict[str, Any]]]] = [
    ("analytics.kind", {"kind": 0}, {}),
    ("analytics.kind", {"kind": 99}, {}),
    ("analytics.upper", {"lower": 2.0, "upper": 2.0}, {}),
    ("analytics.upper", {"kind": KINDS["count"]}, {}),
    ("analytics.bins", {"bins": 3}, {}),
    ("analytics.quantiles", {"quantiles": [0.5]}, {}),
    ("analytics.labels", {"labels": ["a"]}, {}),
    ("analytics.unmasked", {"unmasked": True}, {}),
    ("privacy.epsilon_budget", {}, {"privacy": {}}),
    ("privacy.delta", {}, {"privacy": {"epsilon_budget": 1.0, "delta": 1.5}}),
    ("privacy.clip_norm", {}, {"privacy": {"epsilon_budget": 1.0, "clip_norm": 2.0}}),
    ("total_rounds", {}, {"total_rounds": 2}),
    ("strategy.name", {}, {"strategy": {"name": "fedavgm"}}),
    ("transfer.sealed", {}, {"transfer": {"sealed": True}}),
    ("safeguards.clip_norm", {}, {"safeguards": {"clip_norm": 1.0}}),
    ("evaluation.every_rounds", {}, {"evaluation": {"every_rounds": 1}}),
    ("device_training", {}, {"device_training": {"batch_size": 1}}),
    ("secure_aggregation.group_size", {}, {"secure_aggregation": {"mode": 2, "group_size": 5}}),
    ("secure_aggregation.noise", {}, {"secure_aggregation": {"mode": 2, "noise": 2}}),
]


def test_contradictions_are_refused_when_a_query_is_created(secure: SecureStart) -> None:
    made = secure()
    with administrator(made) as admin:
        for field, question, config in REFUSED:
            wanted = config_of(made, {"kind": KINDS["sum"], **AGE, **question}, **config)
            request = admin_service_pb2.CreateTrainingSessionRequest(name="query", config=wanted)
            with pytest.raises(InvalidRequestError, match=field.rpartition(".")[2]):
                admin.call("CreateTrainingSession", request)
        # The layout of the answers is that of the query, whoever uploads the vector.
        wanted = config_of(made, {"kind": KINDS["sum"], **AGE})
        request = admin_service_pb2.CreateTrainingSessionRequest(name="query", config=wanted)
        created = admin.call("CreateTrainingSession", request).training_session
        with pytest.raises(InvalidRequestError, match="'answer' of 1"):
            upload_model(admin, created.training_session_id, {"answer": np.zeros(2, np.float32)})
        reserved = admin_service_pb2.CreateTrainingSessionRequest(
            name="model",
            model_type="qflare/analytics",
            config=training_pb2.TrainingConfig(rounds=training_pb2.RoundPolicy(quorum=2)),
        )
        with pytest.raises(InvalidRequestError, match="reserved"):
            admin.call("CreateTrainingSession", reserved)
        with pytest.raises(FailedPreconditionError, match="no result yet"):
            read_result(admin, created.training_session_id)
        with pytest.raises(InvalidRequestError, match="trains a model"):
            read_result(admin, made.session(quorum=2))
