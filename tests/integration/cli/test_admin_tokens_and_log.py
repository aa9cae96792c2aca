"""Admin tokens, the audit log and the coordinator's own state, over gRPC."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from qflare.v1 import admin_service_pb2 as pb
from qflare_server.use_cases.access.roles import Role

Deploy = Callable[..., Any]


def call(deployment: Any, method: str, secret: str = "", /, **fields: Any) -> Any:
    request = getattr(pb, f"{method}Request")(**fields)
    metadata = (("authorization", f"Bearer {secret or deployment.admin_token}"),)
    return getattr(deployment.admin, method)(request, metadata=metadata)


def test_an_issued_admin_token_calls_with_its_roles(deploy: Deploy) -> None:
    deployment = deploy()
    issued = call(deployment, "IssueAdminToken", name="alice", roles=["viewer"]).token

    call(deployment, "ListDevices", issued.secret)
    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, "IssueEnrollmentTokens", issued.secret)

    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert list(issued.token.roles) == ["viewer"]


def test_a_revoked_admin_token_is_refused_on_its_next_call(deploy: Deploy) -> None:
    deployment = deploy()
    issued = call(deployment, "IssueAdminToken", name="bob", roles=["operator"]).token
    call(deployment, "ListDevices", issued.secret)

    call(deployment, "RevokeToken", token_id=issued.token.token_id, reason="left")

    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, "ListDevices", issued.secret)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("roles", [[], ["root"], ["device"], ["viewer", "anyone"]])
def test_only_roles_of_administrators_are_given(deploy: Deploy, roles: list[str]) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(deploy(), "IssueAdminToken", name="eve", roles=roles)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_id_issues_once(deploy: Deploy) -> None:
    deployment = deploy()
    call(deployment, "IssueAdminToken", name="carol", roles=["viewer"], request_id="r1")
    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, "IssueAdminToken", name="carol", roles=["viewer"], request_id="r1")
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_the_audit_log_is_exported_oldest_first_and_whole(deploy: Deploy) -> None:
    deployment = deploy()
    call(deployment, "IssueEnrollmentTokens", token_count=600)

    batches = list(call(deployment, "ExportAuditEntries"))
    entries = [entry for batch in batches for entry in batch.entries]

    assert len(batches) > 1
    assert [entry.audit_id for entry in entries] == sorted(entry.audit_id for entry in entries)
    assert sum(entry.event_type == "token.issued" for entry in entries) >= 600


def test_an_export_goes_on_after_an_entry(deploy: Deploy) -> None:
    deployment = deploy()
    call(deployment, "IssueEnrollmentTokens", token_count=3)
    whole = [entry for batch in call(deployment, "ExportAuditEntries") for entry in batch.entries]
    after = whole[-2].audit_id
    rest = call(deployment, "ExportAuditEntries", after_audit_id=after)
    assert [entry.audit_id for batch in rest for entry in batch.entries] == [whole[-1].audit_id]


def test_an_export_filters(deploy: Deploy) -> None:
    deployment = deploy()
    call(deployment, "IssueEnrollmentTokens", token_count=2)
    batches = call(deployment, "ExportAuditEntries", event_type="no.such")
    assert list(batches) == []


@pytest.mark.parametrize(
    ("role", "method", "allowed"),
    [
        (Role.AUDITOR, "ListAuditEntries", True),
        (Role.VIEWER, "ListAuditEntries", False),
        (Role.OPERATOR, "IssueEnrollmentTokens", True),
        (Role.OPERATOR, "ListTokens", False),
        (Role.VIEWER, "GetCoordinatorStatus", True),
    ],
)
def test_roles_decide(deploy: Deploy, role: Role, method: str, allowed: bool) -> None:
    deployment = deploy()
    secret = deployment.issue_admin(role)
    if allowed:
        call(deployment, method, secret)
        return
    with pytest.raises(grpc.RpcError) as refused:
        call(deployment, method, secret)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_the_coordinator_says_how_it_is(deploy: Deploy) -> None:
    deployment = deploy()
    deployment.device("a")
    deployment.session(rounds={"quorum": 1})

    answer = call(deployment, "GetCoordinatorStatus")

    assert answer.version
    assert answer.database.schema_revision
    assert answer.database.latency.ToNanoseconds() > 0
    assert answer.device_counts == {"active": 1}
    assert answer.training_session_counts == {"running": 1}
    assert answer.queues.open_round_count == 1
    assert answer.storage.database_bytes > 0
    assert answer.storage.payload_count == 1
