"""The table of who may call what names every method of both services, and nothing else."""

import pytest

from qflare.v1 import admin_service_pb2, coordinator_service_pb2
from qflare_server.use_cases.access.roles import ACCESS, ADMINISTRATIVE, Role

SERVICES = (
    coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
METHODS = {
    f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_row(method: str) -> None:
    assert ACCESS.get(method)


def test_no_row_is_without_a_method() -> None:
    assert set(ACCESS) <= METHODS


@pytest.mark.parametrize(
    "method", sorted(name for name in METHODS if name.startswith("/qflare.v1.AdminService/"))
)
def test_the_admin_service_is_for_administrators_only(method: str) -> None:
    assert ACCESS[method] <= ADMINISTRATIVE
    assert Role.ADMIN in ACCESS[method]


def test_a_viewer_changes_nothing() -> None:
    reading = ("Get", "List", "Watch", "Download", "Describe")
    allowed = {name.rpartition("/")[2] for name, roles in ACCESS.items() if Role.VIEWER in roles}
    assert all(name.startswith(reading) for name in allowed)
