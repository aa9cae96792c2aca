"""Deployment files: settings and files that they name exist, images are pinned, pods keep to the rules."""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import qflare
from qflare_helper.__main__ import parser
from qflare_server.config import ServerConfig
from qflare_server.serving.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("deploy", "docs/deploy")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix != ".json"
)
SETTINGS = {f"QFLARE_{item.name.upper()}" for item in fields(ServerConfig)} | {"QFLARE_VERSION"}
BY_KUBERNETES = {"QFLARE_PORT", "QFLARE_SERVICE_HOST"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_exists(path: Path) -> None:
    named = set(re.findall(r"QFLARE_[A-Z0-9_]*[A-Z0-9]", path.read_text()))

    assert named - BY_KUBERNETES <= SETTINGS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_repository_exists(path: Path) -> None:
    named = set(re.findall(r"(?<![\w/.-])(?:deploy|docs)/[\w/-]*\w(?:\.\w+)?", path.read_text()))

    made_by_the_reader = {name for name in named if name.startswith("deploy/compose/tls")}
    assert {name for name in named - made_by_the_reader if not (ROOT / name).exists()} == set()


IMAGE = re.compile(r"^(?:FROM|\s+image:)\s+(\S+)", re.MULTILINE)
EXACT = re.compile(r":v?\d+\.\d+(?:\.\d+)?(?:-[\w.-]+)?$|@sha256:[0-9a-f]{64}$")
FULL = {"postgres": 2}
"""Numbers that make up an exact version, where they are not three."""
OWN = f"qflare:${{QFLARE_VERSION:-{qflare.__version__}}}"


def images() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        if path.suffix == ".yaml" or path.name == "Dockerfile":
            for image in IMAGE.findall(path.read_text()):
                yield path, image


def test_every_image_is_pinned_to_an_exact_version() -> None:
    named = [(path, image) for path, image in images() if image not in {"qflare", OWN}]

    assert {"python", "postgres", "prom/prometheus", "grafana/grafana"} <= {
        image.split(":")[0] for _, image in named
    }
    for path, image in named:
        assert EXACT.search(image), f"{path}: {image}"
        version = image.partition(":")[2].partition("-")[0]
        assert version.count(".") + 1 == FULL.get(image.split(":")[0], 3), f"{path}: {image}"


def test_our_own_image_has_the_version_of_this_release() -> None:
    for folder in ("kubernetes", "kubernetes-helper"):
        text = (ROOT / f"deploy/{folder}/kustomization.yaml").read_text()
        (image,) = yaml.safe_load(text)["images"]
        assert image["newTag"] == qflare.__version__
    assert OWN in [image for _, image in images()]


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod of every workload of the Kubernetes base by file."""
    found = {}
    for path in (ROOT / "deploy/kubernetes").glob("*.yaml"):
        document = yaml.safe_load(path.read_text())
        template = document.get("spec", {}).get("template", {})
        if "spec" in template:
            found[path.name] = template["spec"]
    return found


def test_the_base_has_pods() -> None:
    assert set(pods()) == {"deployment.yaml", "migrate-job.yaml"}


@pytest.mark.parametrize("name", pods())
def test_no_variables_of_services_reach_a_pod(name: str) -> None:
    assert pods()[name]["enableServiceLinks"] is False


@pytest.mark.parametrize("name", pods())
def test_probes_start_no_process(name: str) -> None:
    for container in pods()[name]["containers"]:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert "exec" not in container.get(probe, {})


def test_the_port_that_is_probed_is_the_one_that_serves_health() -> None:
    settings = yaml.safe_load((ROOT / "deploy/kubernetes/configmap.yaml").read_text())["data"]
    (container,) = pods()["deployment.yaml"]["containers"]
    port = int(settings["QFLARE_HEALTH_LISTEN"].rpartition(":")[2])

    assert container["startupProbe"]["grpc"] == {"port": port}
    assert container["readinessProbe"]["grpc"] == {"port": port}
    assert {"name": "health", "containerPort": port} in container["ports"]


def test_the_helper_has_one_replica_whose_probes_reach_the_health_port() -> None:
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes-helper/deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = (item["containerPort"] for item in container["ports"] if item["name"] == "health")

    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert (
        container["startupProbe"]["grpc"] == container["readinessProbe"]["grpc"] == {"port": port}
    )
    assert f"--health-listen=0.0.0.0:{port}" in container["args"]


def commands_of_helpers() -> Iterator[list[str]]:
    """Yield the arguments with which each deployment starts a helper."""
    unit = (ROOT / "deploy/systemd/qflare-helper.service").read_text()
    yield re.findall(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)[0].split()
    service = yaml.safe_load((ROOT / "deploy/compose/helper.yaml").read_text())["services"][
        "helper"
    ]
    yield [*service["entrypoint"][1:], *service["command"]]
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes-helper/deployment.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    yield pod["containers"][0]["args"]
    (script,) = pod["initContainers"][0]["args"]
    yield script.partition("|| qflare-helper ")[2].split()


@pytest.mark.parametrize("arguments", list(commands_of_helpers()))
def test_every_option_of_a_helper_exists(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)

    assert options.home
    assert getattr(options, "metrics_listen", None) or options.bootstrap


def test_no_deployment_dumps_core() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())

    helper = yaml.safe_load((ROOT / "deploy/compose/helper.yaml").read_text())

    for unit in ("qflare", "qflare-helper"):
        assert "LimitCORE=0\n" in (ROOT / f"deploy/systemd/{unit}.service").read_text()
    assert helper["services"]["helper"]["ulimits"] == {"core": 0}
    assert compose["services"]["coordinator"]["ulimits"] == {"core": 0}
    assert "--ulimit core=0" in (ROOT / "docs/deploy/docker.md").read_text()


def test_the_autoscaler_scales_the_deployment_by_a_metric_that_the_coordinator_has() -> None:
    folder = ROOT / "deploy/kubernetes-autoscaling"
    scaler = yaml.safe_load((folder / "horizontalpodautoscaler.yaml").read_text())["spec"]
    base = yaml.safe_load((ROOT / "deploy/kubernetes/deployment.yaml").read_text())
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text())
    resource, pods_metric = scaler["metrics"]
    name = pods_metric["pods"]["metric"]["name"]

    assert scaler["scaleTargetRef"]["name"] == base["metadata"]["name"]
    assert scaler["minReplicas"] == base["spec"]["replicas"]
    assert "path: /spec/replicas" in overlay["patches"][0]["patch"]
    assert resource["resource"]["name"] == "cpu"
    assert f"`{name}`" in (ROOT / "docs/observability.md").read_text()
    assert Metrics().registry.get_sample_value(name) == 0
