"""What the distribution says it needs is what its generated code needs, and what the repository pins fits it."""

import configparser
import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qflare

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "qflare" / "v1"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def lower_bound(name: str) -> Version:
    requirements = lines(setup_cfg()["options"]["install_requires"])
    (requirement,) = [item for item in requirements if item.name == name]
    (bound,) = [item.version for item in requirement.specifier if item.operator == ">="]
    return Version(bound)


def test_protobuf_is_at_least_the_version_of_the_stubs() -> None:
    calls = [
        match.groups()
        for path in STUBS.glob("*_pb2.py")
        for match in re.finditer(
            r"# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", path.read_text()
        )
    ]

    assert calls
    assert {Version(".".join(numbers)) for numbers in calls} == {lower_bound("protobuf")}


def test_grpcio_is_at_least_the_version_of_the_stubs() -> None:
    versions = {
        Version(match[1])
        for path in STUBS.glob("*_pb2_grpc.py")
        for match in re.finditer(r"GRPC_GENERATED_VERSION = '([\d.]+)'", path.read_text())
    }

    assert versions
    assert max(versions) <= lower_bound("grpcio")


@pytest.mark.parametrize(
    "section", ["install_requires", "server", "privacy", "demo", "test", "dev"]
)
def test_pins_fit_the_requirements(section: str) -> None:
    parser = setup_cfg()
    source = parser["options" if section == "install_requires" else "options.extras_require"]
    pins = {
        requirement.name.lower().replace("_", "-"): str(requirement.specifier)[2:]
        for requirement in lines((ROOT / ".ci" / "constraints.txt").read_text())
    }

    for requirement in lines(source[section]):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")])


def test_every_package_is_listed() -> None:
    listed = set(setup_cfg()["options"]["packages"].split())

    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in (
            "qflare",
            "qflare_client",
            "qflare_helper",
            "qflare_server",
            "qflare_simulation",
        )
        for path in (ROOT / top).rglob("__init__.py")
    }
    schemas = {"qflare.protos", "qflare.protos.qflare.v1"}
    migrations = {"qflare_server.migrations", "qflare_server.migrations.versions"}
    assert listed == found | schemas | migrations


def test_the_changelog_has_a_place_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()

    assert "## [Unreleased]" in text or f"## [{qflare.__version__}]" in text


ELSEWHERE = {"pytorch", "flower", "lightning", "transformers", "keras", "flax", "ray"}
"""Extras of no pinned version: they are no part of the development install."""


def installed_closure(extras: set[str]) -> set[str]:
    """Return the distributions of this environment that an install with these extras brings."""
    found: set[tuple[str, str]] = set()
    waiting = {("qflare", extra) for extra in ("", *extras)}
    while waiting:
        name, extra = waiting.pop()
        found.add((name, extra))
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        for item in needed:
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                waiting |= {(canonicalize_name(item.name), e) for e in ("", *item.extras)} - found
    return {name for name, _ in found} - {"qflare"}


def test_what_is_audited_is_all_that_is_installed() -> None:
    pins = lines((ROOT / ".ci" / "constraints.txt").read_text())
    extras = set(setup_cfg()["options.extras_require"]) - ELSEWHERE

    assert all(str(item.specifier).startswith("==") for item in pins)
    assert installed_closure(extras) <= {canonicalize_name(item.name) for item in pins}
