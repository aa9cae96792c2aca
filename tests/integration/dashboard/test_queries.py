"""The dashboard's pages of federated analytics: the list of queries, and the result of each kind."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from html import unescape
from typing import Any, Final

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from qflare_client import Analytics, Client, enroll
from qflare_client.admin.administrator import Administrator
from qflare_client.admin.queries import Protection, Question
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.integration.dashboard.test_browser import WIDTHS, Screen, database_url, screen
from tests.support.visitor import Visitor

__all__ = ["Browser", "Deployment", "database_url", "screen"]

HOSTILE: Final = '<script>alert(1)</script>"{{ 7*7 }}'
EPSILON: Final = 600.0
QUESTIONS: Final = {
    "ages": Question("age", "histogram", upper=100.0, bins=200, max_examples=50),
    "mean": Question("age", "mean", upper=100.0, max_examples=50),
    "quarters": Question("age", "quantiles", upper=100.0, bins=5, max_examples=50),
    HOSTILE: Question(HOSTILE, "labels", labels=[HOSTILE, "no"], max_examples=50),
}
POLICY: Final = Analytics(
    columns={
        item.column: ["histogram", "mean", "quantiles", "labels"] for item in QUESTIONS.values()
    },
    min_cohort=2,
    max_epsilon=EPSILON,
    max_examples=50,
    allow_unmasked=True,
)


def ask(deployment: Deployment) -> dict[str, str]:
    """Ask two devices every question; return the ids of the queries by name."""
    ids = {}
    with ExitStack() as stack:
        address = deployment.coordinator.address
        admin = stack.enter_context(Administrator(address, deployment.admin_token))
        clients = []
        for name in ("one", "two"):
            enroll(deployment.bundle(label=name), home=deployment.folder / name)
            opened = Client(home=deployment.folder / name, analytics=POLICY)
            clients.append(stack.enter_context(opened))
        for name, question in QUESTIONS.items():
            made = admin.create_query(name, question, Protection(2, EPSILON))
            ids[name] = made.training_session_id
            values: list[Any] = [50.0] * 50
            if question.kind == "labels":
                values = [HOSTILE] * 40 + ["no"] * 10
            for client in clients:
                client.answer(client.get_task(ids[name], answers_queries=True), values)
            admin.wait(ids[name], timeout_s=60)
        admin.create_query("open", QUESTIONS["mean"], Protection(2, 1.0))
    return ids


def text_of(page: str) -> str:
    """Return the text of a page without its tags, in one line."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())


def test_queries_are_listed_and_each_result_has_its_figures_or_its_picture_and_table(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(dashboard="127.0.0.1:0")
    assert deployment.coordinator.dashboard is not None
    viewer = Visitor(deployment.coordinator.dashboard.url)
    viewer.log_in(deployment.issue_admin(Role.VIEWER))
    assert "No query has been asked." in viewer.get("/queries").text
    model_id = deployment.session()
    ids = ask(deployment)

    listed = viewer.get("/queries").text
    assert model_id not in listed
    for query_id in ids.values():
        assert f'href="/sessions/{query_id}"' in listed
    assert "open running mean age 2 read by the coordinator 1 " in text_of(listed)
    assert "quarters completed quantiles age 2" in text_of(listed)
    pages = {name: viewer.get(f"/sessions/{query_id}").text for name, query_id in ids.items()}
    for name, page in {**pages, "list": listed}.items():
        assert "<script>alert" not in page, name
        assert "49" not in re.findall(r"alert\(1\)[^<]{0,40}", page), name
    assert "mean of age: 2 answers, epsilon" in text_of(pages["mean"])
    for figure in ("Count", "Mean", "Variance", "Deviation"):
        assert f"<dt>{figure}</dt>" in pages["mean"]
    assert 'id="chart-result"' not in pages["mean"]
    histogram = pages["ages"]
    assert 'id="chart-result"' in histogram
    # 200 bins are 50 groups of 4, and a bar on each side.
    assert "52 bars; the highest is 50 to 52 with" in text_of(histogram)
    assert "and 102 more rows: qflare-admin analytics show" in text_of(histogram)
    assert "from to count" in text_of(histogram)
    assert 'id="chart-result"' in pages["quarters"]
    assert "Value: from" in text_of(pages["quarters"])
    assert f"labels of {HOSTILE}" in text_of(pages[HOSTILE])
    assert "3 bars; the highest is " in text_of(pages[HOSTILE])
    assert 'id="result"' not in viewer.get(f"/sessions/{model_id}").text


def test_axe_finds_no_violation_on_pages_of_queries(screen: Screen) -> None:
    ids = ask(screen.deployment)
    found = {}
    for look, width in (("light", "phone"), ("dark", "desk")):
        wide, high = WIDTHS[width]
        page = screen.open(
            Role.VIEWER,
            viewport={"width": wide, "height": high},
            color_scheme=look,
            reduced_motion="reduce",
        )
        for path in ("queries", *(f"sessions/{query_id}" for query_id in ids.values())):
            page.goto(f"{screen.url.rstrip('/')}/{path}")
            results = Axe().run(page)
            if results.violations_count:
                found[path, look] = results.generate_report()
            assert page.evaluate(
                "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            ), (path, look)
    assert found == {}
