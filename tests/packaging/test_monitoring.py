"""The dashboard, the alerts and the page on metrics name metrics that a coordinator exports, and all of them."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client import generate_latest

from qflare_server.serving.observability.database_metrics import DatabaseCollector
from qflare_server.serving.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/qflare.json"
ALERTS = ROOT / "deploy/prometheus/alerts.yaml"
CASES = ROOT / "tests/packaging/alerts.yaml"
PAGE = ROOT / "docs/observability.md"
NAME = re.compile(r"\b(?:qflare|grpc_server)_[a-z_]+\b")
SUFFIX = re.compile(r"_(?:bucket|count|sum|created)$")


def exported() -> set[str]:
    """Return the names of all metrics, as they are written in queries."""
    metrics = Metrics()
    found = {
        line.split()[2]
        for line in generate_latest(metrics.registry).decode().splitlines()
        if line.startswith("# TYPE")
    }
    source = (ROOT / "qflare_server/serving/observability/database_metrics.py").read_text()
    found |= set(re.findall(r'"(qflare_[a-z_]+)"', source))
    assert DatabaseCollector(cast("Any", None)).describe() == []
    return {name for name in found if not name.endswith("_created") and NAME.fullmatch(name)}


def named(text: str) -> set[str]:
    return {SUFFIX.sub("", name) for name in NAME.findall(text)}


def expressions() -> dict[str, str]:
    """Return every query of the dashboard and the alerts, by where it stands."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


@pytest.mark.parametrize(("place", "query"), sorted(expressions().items()))
def test_queries_name_metrics_that_are_exported(place: str, query: str) -> None:
    assert named(query) <= exported(), place


def test_every_alert_is_made_to_fire() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    fired = {
        case["alertname"]
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }

    assert fired == alerts


def test_the_page_explains_every_metric() -> None:
    text = PAGE.read_text()
    assert exported() <= named(text)


def test_the_page_explains_nothing_else() -> None:
    table = "\n".join(line for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    assert named(table) <= exported()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_dashboard_and_its_data_source_have_one_name() -> None:
    source = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    (uid,) = {item["uid"] for item in source["datasources"]}
    used = set(re.findall(r'"uid": "([^"]+)"', DASHBOARD.read_text())) - {"qflare"}
    assert used == {uid}
