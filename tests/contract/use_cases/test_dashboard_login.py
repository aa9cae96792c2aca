"""Log-ins to the dashboard, on both databases: whom they are for, what they are good for, and for how long."""

from datetime import timedelta

import pytest

from qflare_server.errors import PermissionDeniedError, TooManyRequestsError, UnauthenticatedError
from qflare_server.use_cases.access import dashboard_login
from qflare_server.use_cases.access.authentication import Principal
from qflare_server.use_cases.access.dashboard_login import DashboardLogin, may_call
from qflare_server.use_cases.access.roles import Role
from tests.conftest import FakeClock
from tests.support.identity import ADMIN, Coordinator, SimulatedDevice, everything_stored

PEER = "192.0.2.1"


@pytest.fixture
def login(coordinator: Coordinator) -> DashboardLogin:
    return DashboardLogin(coordinator.context, coordinator.authentication)


def token(coordinator: Coordinator, *roles: Role) -> str:
    return coordinator.tokens.issue_admin(ADMIN, "visitor", list(roles or [Role.VIEWER])).secret


def test_a_log_in_may_what_its_token_may(coordinator: Coordinator, login: DashboardLogin) -> None:
    secret = login.log_in(token(coordinator), PEER)

    principal = login.admit(secret, "ListDevices")

    assert principal.name == "admin:visitor"
    assert may_call(principal, "ListDevices")
    assert not may_call(principal, "ListAuditEntries")
    with pytest.raises(PermissionDeniedError):
        login.admit(secret, "ListAuditEntries")


def test_a_device_cannot_log_in(
    coordinator: Coordinator, device: SimulatedDevice, login: DashboardLogin
) -> None:
    _, grant = device.log_in(coordinator)

    with pytest.raises(PermissionDeniedError):
        login.log_in(grant.access_token, PEER)

    (event,) = coordinator.events("dashboard.login_refused")
    assert (event.actor, event.subject, event.peer_address) == ("anonymous", "dashboard", PEER)


def test_a_log_in_ends_after_its_time(
    coordinator: Coordinator, login: DashboardLogin, clock: FakeClock
) -> None:
    secret = login.log_in(token(coordinator), PEER)
    clock.advance(coordinator.context.config.dashboard_login_s - 1)
    login.admit(secret, "ListDevices")

    clock.advance(1)

    with pytest.raises(UnauthenticatedError):
        login.admit(secret, "ListDevices")


def test_a_log_in_ends_with_its_token(
    coordinator: Coordinator, login: DashboardLogin, clock: FakeClock
) -> None:
    issued = coordinator.tokens.issue_admin(ADMIN, "visitor", [Role.VIEWER], 60.0)
    secret = login.log_in(issued.secret, PEER)

    clock.advance(61)

    with pytest.raises(UnauthenticatedError):
        login.admit(secret, "ListDevices")


def test_a_token_is_no_log_in_and_a_log_in_no_token(
    coordinator: Coordinator, login: DashboardLogin
) -> None:
    bearer = token(coordinator)
    secret = login.log_in(bearer, PEER)

    with pytest.raises(UnauthenticatedError):
        login.admit(bearer, "ListDevices")
    with pytest.raises(UnauthenticatedError):
        coordinator.authentication.admit(dashboard_login.LOGIN_METHOD, secret)


def test_neither_secret_is_kept(coordinator: Coordinator, login: DashboardLogin) -> None:
    bearer = token(coordinator)
    secret = login.log_in(bearer, PEER)

    kept = f"{vars(login)}{list(login._logins.values())}"

    assert bearer not in kept
    assert secret not in kept
    stored = everything_stored(coordinator.context.database)
    assert bearer.encode() not in stored
    assert secret.encode() not in stored


def test_failed_attempts_of_one_address_are_bounded_and_lock_nobody_out(
    coordinator: Coordinator, login: DashboardLogin
) -> None:
    for _ in range(5):
        with pytest.raises(UnauthenticatedError):
            login.log_in("wrong", PEER)

    with pytest.raises(TooManyRequestsError) as refused:
        login.log_in("wrong", PEER)

    assert 0 < refused.value.retry_after_s <= 2
    assert login.log_in(token(coordinator), PEER)


def test_refusals_do_not_fill_the_audit_log(
    coordinator: Coordinator, login: DashboardLogin
) -> None:
    for number in range(100):
        with pytest.raises(UnauthenticatedError):
            login.log_in("wrong", f"192.0.2.{number}")

    assert len(coordinator.events("dashboard.login_refused")) == 20


def test_the_oldest_log_in_gives_way(
    coordinator: Coordinator, login: DashboardLogin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_login, "MAX_LOGINS", 2)
    first, second, third = (login.log_in(token(coordinator), f"192.0.2.{n}") for n in range(3))

    with pytest.raises(UnauthenticatedError):
        login.admit(first, "ListDevices")
    login.admit(second, "ListDevices")
    login.admit(third, "ListDevices")


def test_a_log_out_without_a_log_in_is_no_event(
    coordinator: Coordinator, login: DashboardLogin
) -> None:
    login.log_out("nothing", PEER)

    assert coordinator.events("dashboard.logged_out") == []


def test_a_log_in_of_a_user_ends_with_the_providers_token(
    login: DashboardLogin, clock: FakeClock
) -> None:
    expires_at = clock() + timedelta(seconds=60)
    user = Principal("oidc:id.example.org:alice", frozenset({Role.VIEWER}), expires_at=expires_at)
    secret = login.log_in_user(user, PEER)
    assert login.admit(secret, "ListDevices") == user
    with pytest.raises(PermissionDeniedError):
        login.admit(secret, "ListAuditEntries")

    clock.advance(60)

    with pytest.raises(UnauthenticatedError):
        login.admit(secret, "ListDevices")
    with pytest.raises(UnauthenticatedError):
        login.log_in_user(user, PEER)
