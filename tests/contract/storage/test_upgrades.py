"""A database that an earlier version of the program has filled keeps everything when it is upgraded."""

import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, MetaData, insert, select, update

from qflare_server.config import ServerConfig
from qflare_server.storage import schema
from qflare_server.storage.database import Database
from qflare_server.storage.engine import make_engine
from qflare_server.storage.repository import membership, updates

FIRST: Final = "0001"
AT: Final = datetime(2029, 5, 1, 12, 30, tzinfo=UTC)
DIGEST: Final = "ab" * 32
RENAMED: Final = {"training_sessions": {"best_accuracy": "best_value"}}
"""Columns that later revisions call something else, by table."""
DERIVED: Final = {"model_updates": {"aggregated_version"}}
"""Columns that later revisions derive from other rows, by table."""
SESSION: Final = "00000000-0000-4000-8000-000000000001"
Rows = Mapping[str, list[dict[str, Any]]]

DEVICE: Final = {
    "state": "active",
    "state_reason": "",
    "device_type": "phone",
    "hardware_info": {"soc": "a"},
    "network_info": {},
    "capabilities": {"ram_mib": 2048.0},
    "local_epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.01,
    "key_rotation_count": 0,
    "registered_at": AT,
}
MODEL: Final = {
    "digest": DIGEST,
    "parent_digest": "",
    "payload_id": "1" * 32,
    "payload_digest": DIGEST,
    "size_bytes": 3,
    "manifest": b"",
    "layout_digest": DIGEST,
    "statement": b"statement",
    "signature": b"signature",
    "model_type": "mlp",
    "architecture": {},
    "base_version": -1,
    "round_number": 0,
    "participant_count": 0,
    "example_count": 0,
    "aggregation_method": "initial",
    "aggregation_parameters": {},
    "strategy_state": {},
    "contributors_digest": "",
    "metrics": {"accuracy": 0.5},
    "group_metrics": {},
    "released": False,
    "publish_duration_s": 0.0,
    "created_at": AT,
}
UPDATE: Final = {
    "round_number": 1,
    "base_version": 0,
    "payload_id": "1" * 32,
    "payload_digest": DIGEST,
    "size_bytes": 3,
    "statement_digest": DIGEST,
    "example_count": 10,
    "metrics": {},
    "state": "pending",
    "state_reason": "",
    "acceptance_sequence": 1,
    "accepted_at": AT,
}
OLD: Final[Rows] = {
    "devices": [
        {"id": "enrolled", "signature_key_id": "11" * 32, **DEVICE},
        {"id": "program", "signature_key_id": "22" * 32, **DEVICE},
    ],
    "device_keys": [
        {
            "key_id": key_id,
            "device_id": device_id,
            "sequence": 1,
            "algorithm": 2,
            "public_key": b"key",
            "statement": statement,
            "created_at": AT,
            "retired_reason": "",
        }
        for key_id, device_id, statement in (
            ("11" * 32, "enrolled", b"receipt"),
            ("22" * 32, "program", None),
        )
    ],
    "user_tokens": [
        {
            "id": "3" * 32,
            "token_hash": DIGEST,
            "kind": "enrollment",
            "subject": "ward",
            "roles": [],
            "created_at": AT,
            "revoked_reason": "",
        }
    ],
    "payloads": [
        {
            "id": "1" * 32,
            "size_bytes": 3,
            "digest": DIGEST,
            "chunk_digests": b"",
            "location": "row",
            "data": b"abc",
            "created_at": AT,
        }
    ],
    "training_sessions": [
        {
            "id": session_id,
            "name": "digits",
            "model_type": "mlp",
            "architecture": {},
            "state": "running",
            "state_reason": "",
            "config": {"total_rounds": 3},
            "current_round": 1,
            "current_version": 0,
            "created_at": AT,
        }
        for session_id in (SESSION, "in-process-1")
    ],
    "global_models": [
        {"training_session_id": SESSION, "version": 0, **MODEL},
        {"training_session_id": "in-process-1", "version": 0, **MODEL, "digest": "cd" * 32},
    ],
    "rounds": [
        {
            "training_session_id": session_id,
            "number": 1,
            "state": "open",
            "state_reason": "",
            "base_version": 0,
            "quorum": 1,
            "target": 1,
            "selected_count": 1,
            "accepted_count": 1,
            "rejected_count": 0,
            "example_count": 10,
            "nonce": DIGEST,
            "opened_at": AT,
            "deadline_at": AT,
        }
        for session_id in (SESSION, "in-process-1")
    ],
    "round_devices": [{"training_session_id": SESSION, "round_number": 1, "device_id": "enrolled"}],
    "model_updates": [
        {
            "id": "update-1",
            "training_session_id": SESSION,
            "device_id": "enrolled",
            "statement": b"signed",
            "signature": b"signature",
            "key_id": "11" * 32,
            **UPDATE,
        },
        {
            "id": "update-2",
            "training_session_id": "in-process-1",
            "device_id": "program",
            **UPDATE,
        },
    ],
    "evaluations": [
        {
            "training_session_id": SESSION,
            "version": 0,
            "device_id": "enrolled",
            "example_count": 2**40,
            "metrics": {"accuracy": 1.0},
            "device_group": "",
            "reported_at": AT,
        }
    ],
}
"""A training session with devices, updates and evaluations, and one of a program, as revision 0001 held them."""


@pytest.fixture
def engine(empty_database_url: str) -> Iterator[Engine]:
    """Yield a database that the first version of the program has filled."""
    engine = make_engine(ServerConfig(database_url=empty_database_url))
    schema.upgrade(engine, FIRST)
    tables = reflected(engine)
    with engine.begin() as connection:
        for name, rows in OLD.items():
            for row in rows:
                connection.execute(insert(tables[name]).values(**row))
    yield engine
    engine.dispose()


def reflected(engine: Engine) -> Any:
    metadata = MetaData()
    metadata.reflect(engine)
    return metadata.tables


def rows_of(engine: Engine, name: str) -> list[dict[str, Any]]:
    table = reflected(engine)[name]
    with engine.connect() as connection:
        found = connection.execute(select(table).order_by(*table.primary_key)).mappings()
        return [dict(row) for row in found]


def test_nothing_that_was_there_is_lost(engine: Engine) -> None:
    before = {name: rows_of(engine, name) for name in OLD}

    schema.upgrade(engine)

    for name, rows in before.items():
        renamed, derived = RENAMED.get(name, {}), DERIVED.get(name, set())
        kept = [
            {key: row[renamed.get(key, key)] for key in rows[0].keys() - derived}
            for row in rows_of(engine, name)
        ]
        wanted = [{key: row[key] for key in rows[0].keys() - derived} for row in rows]
        assert kept == wanted, name


@pytest.mark.parametrize(
    ("config", "best"),
    [
        ({}, (1, 0.9)),
        ({"evaluation": {"every_rounds": 1}}, (2, 0.7)),
        ({"evaluation": {"every_rounds": 1}, "early_stop": {"metric": "mae"}}, (1, 2.0)),
        (
            {"evaluation": {"every_rounds": 1}, "early_stop": {"metric": "mae", "minimize": True}},
            (2, 1.0),
        ),
        ({"early_stop": {"metric": "auc"}}, (None, None)),
    ],
)
def test_the_best_version_is_found_again(
    engine: Engine, config: dict[str, Any], best: tuple[int | None, float | None]
) -> None:
    metrics = {
        1: {"accuracy": 0.6, "train_accuracy": 0.9, "mae": 2.0},
        2: {"accuracy": 0.7, "train_accuracy": 0.8, "mae": 1.0},
    }
    models, sessions = reflected(engine)["global_models"], reflected(engine)["training_sessions"]
    with engine.begin() as connection:
        for version, measured in metrics.items():
            row = {**MODEL, "digest": f"{version}" * 64, "metrics": measured}
            connection.execute(
                insert(models).values(training_session_id=SESSION, version=version, **row)
            )
        stale = {"config": config, "best_accuracy": 0.9, "best_version": 1}
        connection.execute(update(sessions).where(sessions.c.id == SESSION).values(**stale))

    schema.upgrade(engine)

    (row,) = [row for row in rows_of(engine, "training_sessions") if row["id"] == SESSION]
    assert (row["best_version"], row["best_value"]) == best


def test_an_upgraded_database_goes_back(engine: Engine) -> None:
    before = {name: rows_of(engine, name) for name in OLD}

    schema.upgrade(engine)
    schema.downgrade(engine, FIRST)

    assert {name: rows_of(engine, name) for name in OLD} == before


def test_updates_from_before_stay_in_their_version(engine: Engine) -> None:
    tables = reflected(engine)
    models, rounds, sent = (tables[name] for name in ("global_models", "rounds", "model_updates"))
    row = {**MODEL, "digest": "ef" * 32, "round_number": 1, "base_version": 0}
    done = {"state": "published", "version": 1, "published_at": AT}
    in_version = {"state": "aggregated", "aggregated_version": 1, "aggregated_at": AT}
    with engine.begin() as connection:
        connection.execute(insert(models).values(training_session_id=SESSION, version=1, **row))
        connection.execute(
            update(rounds).where(rounds.c.training_session_id == SESSION).values(**done)
        )
        connection.execute(update(sent).where(sent.c.id == "update-1").values(**in_version))
    before = rows_of(engine, "model_updates")

    schema.upgrade(engine)

    with Database(engine).read() as session:
        found = [updates.get_update(session, row["id"]) for row in before]
        assert updates.contributors(session, SESSION, 1) == [DIGEST]
    assert [(row.state, row.aggregated_version, row.aggregated_at) for row in found if row] == [
        ("aggregated", 1, AT),
        ("pending", None, None),
    ]
    schema.downgrade(engine, FIRST)
    assert rows_of(engine, "model_updates") == before


def test_evaluations_from_before_are_unsigned(engine: Engine) -> None:
    schema.upgrade(engine)

    (row,) = rows_of(engine, "evaluations")

    names = ("statement", "statement_digest", "signature", "key_id", "weight")
    assert {name: row[name] for name in names} == dict.fromkeys(names)


def test_updates_from_before_have_an_origin_and_versions_say_nothing_of_it(engine: Engine) -> None:
    schema.upgrade(engine)

    origins = {
        row["training_session_id"]: row["origin"] for row in rows_of(engine, "model_updates")
    }
    assert origins == {SESSION: "device", "in-process-1": "in_process"}
    assert {row["in_process_count"] for row in rows_of(engine, "global_models")} == {None}


def test_devices_from_before_are_named_after_their_tokens(engine: Engine) -> None:
    ids = [f"5f0c31aa-7d5e-4f5e-9d22-4d90f5cc31{number}" for number in range(60, 65)]
    labels = ["ward 3", "ward 3", ids[0], "", None]
    devices, tokens = (reflected(engine)[name] for name in ("devices", "user_tokens"))
    with engine.begin() as connection:
        for device_id, label in zip(ids, labels, strict=True):
            connection.execute(insert(devices).values(id=device_id, **DEVICE))
            if label is not None:
                for used_at, subject in ((AT, label), (AT + timedelta(days=1), "rekey")):
                    connection.execute(
                        insert(tokens).values(
                            **OLD["user_tokens"][0]
                            | {"id": uuid.uuid4().hex, "token_hash": uuid.uuid4().hex}
                            | {"subject": subject, "device_id": device_id, "used_at": used_at}
                        )
                    )

    schema.upgrade(engine)

    names = {row["id"]: row["name"] for row in rows_of(engine, "devices")}
    assert [names[device_id] for device_id in ids] == [
        "ward-3",
        "ward-3-2",
        "5f0c31aa",
        "5f0c31aa-2",
        "5f0c31aa-3",
    ]
    assert [names["enrolled"], names["program"]] == ["enrolled", "program"]


def test_sessions_and_devices_from_before_are_in_no_group(engine: Engine) -> None:
    schema.upgrade(engine)
    database = Database(engine)

    with database.read() as session:
        standing = membership.find_standing(session, SESSION, "enrolled")
        other = membership.find_standing(session, SESSION, "program")
        groups = membership.groups_of(session, ["enrolled", "program"])

    assert standing is not None
    assert other is not None
    assert (standing.in_groups, standing.was_selected, other.was_selected) == (True, True, False)
    assert (standing.device_type, standing.confirmed_at) == ("phone", None)
    assert groups == {}


def test_rounds_from_before_count_the_failures_that_are_kept(engine: Engine) -> None:
    schema.upgrade(engine, "0012")
    failures = reflected(engine)["device_failures"]
    told = {"kind": "MemoryError", "text": "", "report_count": 2, "reported_at": AT}
    of_round = {"training_session_id": SESSION, "round_number": 1}
    with engine.begin() as connection:
        for device_id in ("enrolled", "program"):
            connection.execute(insert(failures).values(device_id=device_id, **of_round, **told))

    schema.upgrade(engine)

    counts = {row["training_session_id"]: row["failed_count"] for row in rows_of(engine, "rounds")}
    assert counts == {SESSION: 2, "in-process-1": 0}
