"""Every text column holds the longest value that its writers produce; only PostgreSQL enforces lengths."""

import os
from enum import StrEnum
from typing import Final

import pytest
from sqlalchemy import String

from qflare_server.cli.terminal import MAX_NAME
from qflare_server.errors import QflareError
from qflare_server.serving.coordinator import replica_name
from qflare_server.storage import tables
from qflare_server.storage.repository import leases
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.device_names import MAX_NAME as MAX_DEVICE_NAME
from qflare_server.training.config import MAX_ATTRIBUTE, MAX_STRATEGY_NAME
from qflare_server.use_cases.access.failed_attempts import FailedAttempts
from qflare_server.use_cases.access.tokens import MAX_LABEL, Tokens
from qflare_server.use_cases.devices.administration import MAX_DEVICE_ID, MAX_REASON, Profile
from qflare_server.use_cases.devices.enrollment import LOST_KEYS
from tests.conftest import START
from tests.support.use_cases import CoordinatorHarness

UUID: Final = 36
HEX_16: Final = 32
DIGEST: Final = 64
WORD: Final = 27
"""Longest type of an event."""
SOCKET: Final = 108
"""Longest path of a Unix socket; network addresses are shorter."""


def longest(states: type[StrEnum]) -> int:
    return max(len(state.value) for state in states)


LONGEST: Final[dict[str, int]] = {
    "audit_log.actor": len("device:") + MAX_DEVICE_ID,
    "audit_log.authentication_method": len("operating-system"),
    "audit_log.event_type": WORD,
    "audit_log.peer_address": SOCKET + len("unix:"),
    "audit_log.risk_level": longest(tables.RiskLevel),
    "audit_log.subject": len("device:") + MAX_DEVICE_ID,
    "device_failures.kind": 64,
    "device_failures.text": 200,
    "device_groups.group_name": 63,
    "device_keys.retired_reason": max(len(LOST_KEYS), len("replaced in-process")),
    "devices.device_type": 100,
    "devices.name": MAX_DEVICE_NAME,
    "devices.id": MAX_DEVICE_ID,
    "devices.reported_type": 100,
    "devices.state": longest(tables.DeviceState),
    "devices.state_reason": MAX_REASON,
    "evaluations.device_group": 100,
    "global_models.aggregation_method": MAX_STRATEGY_NAME,
    "global_models.model_type": 100,
    "idempotent_calls.actor": len("admin:@local") + MAX_NAME,
    "idempotent_calls.method": 40,
    "idempotent_calls.request_id": 100,
    "leases.holder": 64,
    "leases.name": len("aggregate:") + UUID,
    "model_updates.origin": longest(tables.UpdateOrigin),
    "model_updates.state": longest(tables.UpdateState),
    "model_updates.state_reason": 500,
    "neighbor_groups.stage": longest(tables.GroupStage),
    "neighbor_groups.stage_reason": 500,
    "payloads.location": len("store"),
    "payloads.store": len("database"),
    "uploads.store": len("database"),
    "payload_places.store": len("database"),
    "replicas.payload_store": 32,
    "replicas.address": leases.MAX_ADDRESS,
    "replicas.id": 64,
    "replicas.version": 40,
    "rounds.state": longest(tables.RoundState),
    "rounds.state_reason": 500,
    "training_session_groups.group_name": 63,
    "webhook_cursors.endpoint": DIGEST,
    "training_sessions.model_type": 100,
    "training_sessions.name": 200,
    "training_sessions.state": longest(tables.TrainingSessionState),
    "training_sessions.state_reason": 500,
    "trust_documents.kind": len("keyset"),
    "unmaskings.helper_id": DIGEST,
    "user_tokens.kind": longest(tables.TokenKind),
    "user_tokens.revoked_reason": MAX_LABEL,
    "user_tokens.subject": max(MAX_DEVICE_ID, MAX_LABEL),
}
"""Characters of the longest value, by column; identifiers of fixed length follow from their names."""


def fixed_length(column: str) -> int | None:
    """Return the length of identifiers and digests, None for other columns."""
    name = column.partition(".")[2]
    if name.endswith(("digest", "key_id", "token_hash", "nonce")):
        return DIGEST
    if name in {"training_session_id", "update_id"} or column in {
        "training_sessions.id",
        "model_updates.id",
    }:
        return UUID
    if name in {"payload_id", "download_payload_id", "family_id"} or column in {
        "payloads.id",
        "payloads.chunks_id",
        "payload_places.identity",
        "payload_places.next_owner",
        "payload_places.owner",
        "user_tokens.id",
    }:
        return HEX_16
    return MAX_DEVICE_ID if name == "device_id" else None


def test_every_text_column_holds_its_longest_value() -> None:
    lengths = {
        f"{table.name}.{column.name}": column.type.length
        for table in tables.Base.metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, String) and column.type.length is not None
    }
    needed = {column: fixed_length(column) or LONGEST.get(column) for column in lengths}

    assert [column for column, count in needed.items() if count is None] == []
    assert {
        column: (lengths[column], count)
        for column, count in needed.items()
        if count is not None and lengths[column] < count
    } == {}


@pytest.mark.parametrize("character", ["x", "\N{MATHEMATICAL SCRIPT SMALL A}"], ids=["x", "wide"])
def test_the_longest_values_are_stored(core: CoordinatorHarness, character: str) -> None:
    device_id, reason = character * MAX_DEVICE_ID, character * MAX_REASON
    core.devices.add(Caller(f"device:{device_id}"), device_id, Profile(character * 100))
    core.devices.suspend(Caller(f"admin:{character * MAX_NAME}@local"), device_id, reason)
    tokens = Tokens(core.context)
    issued = tokens.issue_admin(Caller(f"admin:{character * 200}"), character * 200, ["viewer"])
    tokens.revoke(Caller(), issued.token.id, character * MAX_LABEL)
    FailedAttempts(core.context).record(
        Caller("anonymous", "unix:" + "p" * SOCKET), "login.refused", f"device:{device_id}x", reason
    )
    core.context.database.write(
        lambda session: leases.announce(
            session,
            replica_name(character * 64, 65_535, "12"),
            character * 300,
            "1.0.0",
            "x" * 32,
            START,
            START,
        )
    )

    assert core.devices.get(device_id).state_reason == reason
    assert core.count(tables.AuditLog) >= 5


def test_processes_of_a_host_have_names_of_their_own() -> None:
    host = "h" * 63
    names = {replica_name(host, port, worker) for port in (50051, 50052) for worker in "01"}

    assert len(names) == 4
    assert max(map(len, names)) <= 64
    assert replica_name("host", 50051, "0") == "host:50051:0"
    assert replica_name(os.fsdecode(b"\xff" * 70), 50051, "0").isascii()


def test_a_strategy_has_a_short_name(core: CoordinatorHarness) -> None:
    with pytest.raises(QflareError, match=r"strategy\.name"):
        core.create(strategy={"name": "s" * (MAX_STRATEGY_NAME + 1)})
    assert MAX_ATTRIBUTE == 100
