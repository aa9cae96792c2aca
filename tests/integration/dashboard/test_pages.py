"""The dashboard over HTTP: who gets in, what the pages say, what goes around every answer."""

import http.client
import logging
import socket
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from sqlalchemy import update

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1.training_pb2 import TrainingConfig
from qflare_client import TaskKind
from qflare_server.config import ConfigError
from qflare_server.serving.dashboard.app import PAGES
from qflare_server.serving.dashboard.middleware import HEADERS
from qflare_server.storage import tables
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import AuditFilter, Caller
from qflare_server.storage.tables import ModelUpdate, UpdateOrigin
from qflare_server.use_cases.access.dashboard_login import ADMIN_SERVICE
from qflare_server.use_cases.access.roles import ACCESS, ADMINISTRATIVE, Role
from qflare_server.use_cases.devices.administration import Profile
from tests.integration.conftest import Deployment
from tests.support.use_cases import with_quorum
from tests.support.visitor import Visitor

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
Deploy = Callable[..., Deployment]


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    return deploy(dashboard="127.0.0.1:0")


def url(deployment: Deployment) -> str:
    assert deployment.coordinator.dashboard is not None
    return deployment.coordinator.dashboard.url


def visitor(deployment: Deployment, *roles: Role) -> Visitor:
    """Return a visitor, logged in if it is given roles."""
    made = Visitor(url(deployment))
    if roles:
        answer = made.log_in(deployment.issue_admin(*roles))
        assert (answer.code, answer.headers["location"]) == (303, "/")
    return made


def events(deployment: Deployment, event_type: str) -> list[Any]:
    audit = deployment.coordinator.use_cases.audit
    return list(audit.list(PageRequest(), AuditFilter(event_type=event_type)).rows)


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    """Return a training session whose only round one device has taken part in."""
    client = deployment.device("one", device_type="phone")
    training_session_id = deployment.session(total_rounds=2, rounds={"quorum": 1, "target": 1})
    task = client.get_task(training_session_id)
    assert task.kind is TaskKind.TRAIN
    base = client.download_base(task)
    metrics = {"loss": 0.25, "accuracy": 0.5}
    client.submit(task, base, {"w": np.ones(4, np.float32)}, 10, metrics)
    while client.get_task(training_session_id).base_version < 1:
        pass
    return training_session_id


def paths(deployment: Deployment, session_id: str) -> list[str]:
    (device,) = deployment.coordinator.use_cases.devices.list_active()
    values = {"session_id": session_id, "number": "1"}
    found = [page.path.format(**values) for page in PAGES if page.path != "/device"]
    return [*found, f"/device?id={device.id}"]


def test_nobody_sees_a_page_without_a_log_in(deployment: Deployment) -> None:
    stranger = visitor(deployment)

    answers = [stranger.get(page.path) for page in PAGES]

    assert {(item.code, item.headers["location"], item.text) for item in answers} == {
        (303, "/login", "")
    }


def test_every_page_is_shown_to_an_auditing_viewer(deployment: Deployment, session_id: str) -> None:
    auditor = visitor(deployment, Role.VIEWER, Role.AUDITOR)

    answers = {path: auditor.get(path).code for path in paths(deployment, session_id)}

    assert set(answers.values()) == {200}, answers


def test_every_page_names_methods_of_the_table_of_roles() -> None:
    methods = {ADMIN_SERVICE + method for page in PAGES for method in page.methods}

    assert methods <= ACCESS.keys()
    assert all(ACCESS[method] <= ADMINISTRATIVE for method in methods)
    assert all(page.methods for page in PAGES)


def test_a_viewer_does_not_see_the_audit_log(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.VIEWER)

    assert viewer.get("/audit").code == 403
    overview = viewer.get("/").text
    assert "/audit" not in overview
    assert "Audit events" not in overview


def test_an_enrollment_token_does_not_open_it(deployment: Deployment) -> None:
    issued = deployment.coordinator.use_cases.tokens.issue_enrollment(Caller())[0]

    answer = visitor(deployment).log_in(issued.secret)

    assert answer.code == 401


def test_a_wrong_token_is_refused_and_audited_without_itself(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    stranger = visitor(deployment)

    answer = stranger.log_in("qfm1.wrong.token")

    assert answer.code == 401
    assert "does not open" in answer.text
    assert "set-cookie" not in answer.headers
    (event,) = events(deployment, "dashboard.login_refused")
    assert (event.actor, event.risk_level, event.peer_address) == ("anonymous", "high", "127.0.0.1")
    assert "wrong" not in f"{event.details}{caplog.text}{answer.text}"


def test_attempts_are_bounded(deployment: Deployment) -> None:
    stranger, good = visitor(deployment), deployment.issue_admin(Role.VIEWER)

    codes = [stranger.log_in(f"wrong {number}").code for number in range(6)]
    answer = stranger.log_in("wrong again")

    assert codes == [401] * 5 + [429]
    assert answer.code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert stranger.log_in(good).code == 303


def test_the_cookie_is_for_the_server_alone_and_bounded(deployment: Deployment) -> None:
    token = deployment.issue_admin(Role.VIEWER)

    cookie = Visitor(url(deployment)).log_in(token).headers["set-cookie"]

    assert {part.strip().lower() for part in cookie.split(";")[1:]} == {
        "httponly",
        "max-age=28800",
        "path=/",
        "samesite=strict",
    }
    assert token not in cookie


def test_a_log_in_and_a_log_out_are_audited(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.VIEWER)

    answer = viewer.ask("POST", "/logout")

    assert (answer.code, answer.headers["location"]) == (303, "/login")
    for event_type in ("dashboard.logged_in", "dashboard.logged_out"):
        (event,) = events(deployment, event_type)
        assert event.actor == "admin:tester"


def test_a_log_out_ends_the_log_in_wherever_its_cookie_is(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.VIEWER)
    thief = Visitor(url(deployment))
    thief.cookie = viewer.cookie
    assert thief.get("/").code == 200

    viewer.ask("POST", "/logout")

    assert thief.get("/").code == 303


def test_a_log_in_ends_after_its_time(deploy: Deploy) -> None:
    deployment = deploy(dashboard="127.0.0.1:0", dashboard_login_s=1.0)
    viewer = visitor(deployment, Role.VIEWER)
    assert viewer.get("/").code == 200
    codes = [200]

    while codes[-1] == 200 and len(codes) < 10_000:
        codes.append(viewer.get("/").code)

    assert codes[-1] == 303
    assert "Your log-in is over" in viewer.get("/login").text


def test_who_is_logged_in_needs_no_form(deployment: Deployment) -> None:
    answer = visitor(deployment, Role.VIEWER).get("/login")

    assert (answer.code, answer.headers["location"]) == (303, "/")


def test_a_revoked_token_shows_nothing_more(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.VIEWER)
    tokens = deployment.coordinator.use_cases.tokens
    newest = tokens.list(PageRequest(1), "admin").rows[0]

    tokens.revoke(Caller(), newest.id, "left")

    assert viewer.get("/").code == 303


def test_a_form_of_another_site_is_refused(deployment: Deployment) -> None:
    token = deployment.issue_admin(Role.VIEWER)

    by_origin = visitor(deployment).log_in(token, Origin="https://evil.example")
    by_site = visitor(deployment).log_in(token, Sec_Fetch_Site="cross-site")

    assert (by_origin.code, by_site.code) == (403, 403)


def test_a_large_form_is_refused(deployment: Deployment) -> None:
    answer = visitor(deployment).ask("POST", "/login", b"token=" + b"x" * 5000)

    assert answer.code == 413


def test_a_host_that_is_not_known_is_refused(deployment: Deployment) -> None:
    """A page of another site whose name was made to point here must not read the dashboard (DNS rebinding)."""
    host, _, port = url(deployment).removeprefix("http://").rstrip("/").rpartition(":")
    for name, code in (("rebound.example.test", 421), ("localhost", 200), (host, 200)):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", "/login", headers={"Host": f"{name}:{port}"})
        assert connection.getresponse().status == code
        connection.close()


def test_a_form_with_more_fields_than_any_is_refused(deployment: Deployment) -> None:
    answer = visitor(deployment).ask("POST", "/login", b"token=x&" + b"a=b&" * 9)

    assert answer.code == 400


@pytest.mark.parametrize("path", ["/login", "/", "/static/dashboard.css", "/none", "/audit"])
def test_every_answer_binds_the_browser(deployment: Deployment, path: str) -> None:
    answer = visitor(deployment, Role.VIEWER).get(path)

    assert {name: answer.headers.get(name.lower()) for name in HEADERS} == HEADERS
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    kept = "no-cache" if path.startswith("/static") else "no-store"
    assert answer.headers["cache-control"] == kept
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/none", 404),
        ("/sessions/none", 404),
        ("/device?id=none", 404),
        ("/sessions/none/rounds/1", 404),
        ("/sessions/none/rounds/x", 400),
        ("/devices?state=odd", 400),
        ("/devices?page=odd", 400),
        ("/devices?type=" + "x" * 400, 400),
        ("/audit?risk=odd", 400),
        ("/static/../site.py", 404),
    ],
)
def test_a_wrong_address_is_answered_in_words(deployment: Deployment, path: str, code: int) -> None:
    answer = visitor(deployment, Role.VIEWER, Role.AUDITOR).get(path)

    assert answer.code == code
    assert "Traceback" not in answer.text


STRANGE = [
    "%00",
    "a%00b",
    "%C2%9B31m",
    "%E2%80%AE",
    "%ED%A0%80",
    "%FF",
    "%0D%0ASet-Cookie:x=y",
    "'%22%3Cb%3E%7B%7B7*7%7D%7D",
    "%252e%252e",
    "9" * 400,
    "-1",
    "1e9",
    "x" * 3000,
]


def test_no_text_of_a_visitor_is_an_internal_error(deployment: Deployment, session_id: str) -> None:
    """Every part of a path and every parameter: a database, a log or a terminal may take less than HTTP does."""
    viewer = visitor(deployment, Role.VIEWER, Role.AUDITOR)
    names = ("id", "state", "type", "page", "risk", "event", "actor", "subject")
    asked = [f"/sessions/{text}" for text in STRANGE]
    asked += [f"/sessions/{text}/rounds/1" for text in STRANGE]
    asked += [f"/sessions/{session_id}/rounds/{text}" for text in STRANGE]
    asked += [
        f"{path}?" + "&".join(f"{name}={text}" for name in names)
        for path in ("/device", "/sessions", f"/sessions/{session_id}")
        for text in STRANGE
    ]
    asked += [
        f"/audit?{name}={text}"
        for name in ("event", "actor", "subject", "page")
        for text in STRANGE
    ]
    asked += [f"/devices?{name}={text}" for name in ("type", "page") for text in STRANGE]
    asked += [f"/static/{text}" for text in STRANGE]

    answers = {path: viewer.get(path) for path in asked}

    wrong = {path: answer.code for path, answer in answers.items() if answer.code >= 500}
    assert wrong == {}
    assert not any("set-cookie" in answer.headers for answer in answers.values())
    assert not any("\x9b" in answer.text or "\u202e" in answer.text for answer in answers.values())
    assert not any("'\"<b>" in answer.text or ">49<" in answer.text for answer in answers.values())


def test_nothing_can_be_changed(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.ADMIN)

    codes = {viewer.ask(method, "/devices").code for method in ("POST", "PUT", "DELETE", "PATCH")}

    assert codes == {405}


def test_hostile_names_are_shown_as_they_are(deployment: Deployment) -> None:
    use_cases = deployment.coordinator.use_cases
    profile = Profile(device_type=HOSTILE, capabilities={HOSTILE: HOSTILE})
    use_cases.devices.add(Caller(name=HOSTILE), HOSTILE, profile)
    use_cases.devices.suspend(Caller(), HOSTILE, HOSTILE)
    deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(
            name=HOSTILE,
            model_type=HOSTILE,
            config=with_quorum(TrainingConfig()),
        ),
        metadata=deployment.metadata,
    )
    auditor = visitor(deployment, Role.VIEWER, Role.AUDITOR)
    device = f"/device?{urlencode({'id': HOSTILE})}"

    texts = [auditor.get(path).text for path in ("/", "/sessions", "/devices", device, "/audit")]

    for text in texts:
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script>alert" not in text
        assert "<img" not in text


def test_the_pages_say_what_the_training_did(deployment: Deployment, session_id: str) -> None:
    viewer = visitor(deployment, Role.VIEWER)

    session = viewer.get(f"/sessions/{session_id}").text
    taken = viewer.get(f"/sessions/{session_id}/rounds/1").text

    assert "While training: 50.0 % at version 1." in session
    assert "While training: 0.25 at version 1." in session
    assert "1 of 1" in session
    assert "aggregated" in taken
    assert "in-process" not in taken


def test_an_update_of_a_program_is_marked(deployment: Deployment, session_id: str) -> None:
    edit = update(ModelUpdate).values(origin=UpdateOrigin.IN_PROCESS.value)
    deployment.coordinator.parts.database.write(lambda session: session.execute(edit))

    taken = visitor(deployment, Role.VIEWER).get(f"/sessions/{session_id}/rounds/1").text

    assert '<span class="soft">in-process</span>' in taken


def test_metrics_are_chosen_and_compared(deployment: Deployment, session_id: str) -> None:
    viewer = visitor(deployment, Role.VIEWER)
    page = f"/sessions/{session_id}"

    both, one = viewer.get(page).text, viewer.get(f"{page}?metric=loss&metric=unknown").text

    assert 'id="chart-accuracy"' in both
    assert 'id="chart-loss"' in both
    assert 'id="chart-accuracy"' not in one
    assert 'id="chart-loss"' in one
    assert f"{page}?metric=loss&amp;metric=accuracy#curves" in one
    assert viewer.get(page + "?" + "&".join(f"metric=m{n}" for n in range(9))).code == 400


def test_the_lineage_is_shown_verified_with_statement_and_proof(
    deployment: Deployment, session_id: str
) -> None:
    auditor = visitor(deployment, Role.VIEWER, Role.AUDITOR)
    deployment.coordinator.use_cases.audit.head(fresh=True)

    session = auditor.get(f"/sessions/{session_id}").text
    versions = auditor.get(f"/sessions/{session_id}/versions").text
    version = auditor.get(f"/sessions/{session_id}/versions/1").text

    model = deployment.coordinator.use_cases.promotion.describe(session_id, 1)
    for text in (session, versions):
        assert text.count("\N{CHECK MARK} verified") == 2
        assert f'title="{model.digest}"' in text
        assert f'href="/sessions/{session_id}/versions/1"' in text
    assert "Verified by this coordinator" in version
    for said in (model.digest, model.parent_digest, model.contributors_digest, "is leaf"):
        assert said in version
    assert auditor.get(f"/sessions/{session_id}/versions/7").code == 404


def test_a_version_that_was_edited_is_shown_as_broken(
    deployment: Deployment, session_id: str
) -> None:
    """A page must not say that a version is verified after its statement or its updates changed in the database."""
    viewer = visitor(deployment, Role.VIEWER)
    page = f"/sessions/{session_id}/versions/1"
    assert "The proof fails" not in viewer.get(page).text
    models, updates = tables.GlobalModel.__table__, tables.ModelUpdate.__table__
    database = deployment.coordinator.parts.database

    database.write(
        lambda session: session.execute(update(updates).values(statement_digest="00" * 32))
    )
    by_update = viewer.get(page).text
    changed = update(models).where(models.c.version == 0).values(statement=b"\x0a\x01x")
    database.write(lambda session: session.execute(changed))
    line = viewer.get(f"/sessions/{session_id}/versions").text

    assert "The proof fails" in by_update
    assert line.count("\N{CHECK MARK} verified") == 1
    assert "broken" in line


def test_the_configuration_is_shown(deployment: Deployment, session_id: str) -> None:
    text = visitor(deployment, Role.VIEWER).get(f"/sessions/{session_id}").text

    _, _, shown = text.partition("Configuration</h2>")
    for name, value in (("total_rounds", "2"), ("quorum", "1"), ("update_kind", "weights")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in shown


def test_a_running_round_is_shown_device_by_device(deployment: Deployment) -> None:
    first, second = deployment.device("one"), deployment.device("two", device_type="phone")
    session_id = deployment.session(total_rounds=1, rounds={"quorum": 2, "target": 2})
    task = first.get_task(session_id)
    first.submit(task, first.download_base(task), {"w": np.ones(4, np.float32)}, 10, {})
    viewer = visitor(deployment, Role.VIEWER)

    for path in (f"/sessions/{session_id}", f"/sessions/{session_id}/rounds/1"):
        _, _, shown = viewer.get(path).text.partition('<ul class="roll"')
        waiting, sent = shown.split("</ul>")[0].split("<li ")[1:]
        assert second.device_id in waiting
        assert "no update; last seen" in waiting
        assert first.device_id in sent
        assert "update after" in sent


def test_training_sessions_are_compared(deployment: Deployment, session_id: str) -> None:
    other = deployment.session(total_rounds=5, rounds={"quorum": 1, "target": 1})
    viewer = visitor(deployment, Role.VIEWER)

    text = viewer.get(f"/compare?session={session_id}&session={other}").text
    listed = viewer.get("/sessions").text

    assert 'id="chart-compared-0"' in text
    assert "test (training data only): 50.0 % at version 1." in text
    assert "<code>total_rounds</code>" in text
    assert "<code>rounds.target</code>" not in text
    assert listed.count('type="checkbox" name="session"') == 2
    assert viewer.get("/compare?session=none").code == 404
    assert viewer.get("/compare?" + "&".join(f"session={n}" for n in range(5))).code == 400


def test_a_column_that_says_nothing_is_not_shown(deployment: Deployment, session_id: str) -> None:
    page = visitor(deployment, Role.VIEWER).get(f"/sessions/{session_id}").text

    _, _, rounds = page.partition("Rounds, newest first")
    assert ">Took part<" in rounds
    assert ">Rejected<" not in rounds
    assert ">Late<" not in rounds
    assert ">Failed<" not in rounds


def test_a_selected_device_without_an_update_is_named(deployment: Deployment) -> None:
    deployment.device("one")
    session_id = deployment.session(
        total_rounds=1, rounds={"quorum": 1, "target": 1}, selection={"device_count": 1}
    )
    (device,) = deployment.coordinator.use_cases.devices.list_active()

    text = visitor(deployment, Role.VIEWER).get(f"/sessions/{session_id}/rounds/1").text

    assert "Selected, but no update" in text
    assert device.id in text


def test_lists_go_on_page_by_page(deployment: Deployment) -> None:
    devices = deployment.coordinator.use_cases.devices
    for number in range(120):
        devices.add(Caller(), f"device {number:03}", Profile())
    auditor = visitor(deployment, Role.VIEWER, Role.AUDITOR)

    for path, wanted in (("/devices", 120), ("/audit?event=device.registered", 120)):
        seen, place = 0, path
        while place:
            text = auditor.get(place).text
            seen += text.count('<th scope="row"><a href="/device?') or text.count(
                '<th scope="row">device.registered'
            )
            _, found, rest = text.partition('rel="next" href="')
            place = rest.partition('"')[0].replace("&amp;", "&") if found else ""
        assert seen == wanted


def test_devices_are_counted_by_state_and_type(deployment: Deployment) -> None:
    devices = deployment.coordinator.use_cases.devices
    for number in range(3):
        devices.add(Caller(), f"device {number}", Profile(device_type="phone"))
    devices.suspend(Caller(), "device 2", "lost")
    viewer = visitor(deployment, Role.VIEWER)

    active = viewer.get("/devices?state=active").text
    phones = viewer.get("/devices?type=phone").text

    assert active.count("/device?id=") == 2
    assert phones.count("/device?id=") == 3


def test_it_says_that_the_coordinator_drains(deployment: Deployment) -> None:
    viewer = visitor(deployment, Role.VIEWER)

    deployment.coordinator.draining.set()

    assert "shutting down" in viewer.get("/").text


def test_it_stops_with_the_coordinator(deploy: Deploy) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")
    viewer = visitor(deployment, Role.VIEWER)
    port = int(url(deployment).rstrip("/").rpartition(":")[2])

    deployment.coordinator.stop(0.5)

    with pytest.raises(OSError, match="refused"):
        viewer.get("/")
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_without_the_setting_it_is_not_served(deploy: Deploy) -> None:
    assert deploy().coordinator.dashboard is None


def test_of_several_workers_only_the_first_serves_it(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QFLARE_WORKER", "1")

    assert deploy(dashboard="127.0.0.1:0").coordinator.dashboard is None


def test_an_address_in_use_is_said(deploy: Deploy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(ConfigError, match="QFLARE_DASHBOARD: cannot bind 127"):
            deploy(dashboard=address)


def test_without_the_extra_the_command_to_install_it_is_said(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("connections", "server"):
        monkeypatch.delitem(sys.modules, f"qflare_server.serving.http.{name}", raising=False)

    with pytest.raises(ConfigError, match=r"QFLARE_DASHBOARD: pip install 'qflare\[dashboard\]'"):
        deploy(dashboard="127.0.0.1:0")


def test_audit_events_are_counted_by_risk_since_a_time(deployment: Deployment) -> None:
    use_cases = deployment.coordinator.use_cases
    use_cases.devices.add(Caller(), "lost", Profile())
    use_cases.devices.suspend(Caller(), "lost", "stolen")
    entries = use_cases.audit.list(PageRequest(1000), AuditFilter()).rows
    wanted = Counter(row.risk_level for row in entries)

    counts = use_cases.audit.count_by_risk(min(row.created_at for row in entries))

    assert +Counter(counts) == wanted
    assert wanted["high"] >= 1
    assert use_cases.audit.count_by_risk(use_cases.overview.now() + timedelta(hours=1)) == {}
