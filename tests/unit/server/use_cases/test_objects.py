"""Every method of both services says what it is for; none that names a training session or an update leaves it open."""

from collections.abc import Iterator
from typing import Any

import pytest

from qflare.v1 import admin_service_pb2, coordinator_service_pb2
from qflare_server.use_cases.access import objects
from qflare_server.use_cases.access.objects import RULES
from qflare_server.use_cases.access.roles import ACCESS, Role

SERVICES = (
    coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in SERVICES
    for method in service.methods
}
OPEN = {objects.names_nothing, objects.own_only}
NAMES = {"training_session_id", "update_id", "device_id"}
UNSIGNED_ENVELOPES = {"RotateKeys"}
"""Methods whose signed statement is about the calling device's own keys."""


def fields_of(message: Any, seen: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Yield the fields of a message and of the messages in it."""
    for field in message.fields:
        yield field
        inner = field.message_type
        if inner is not None and inner.full_name not in seen:
            yield from fields_of(inner, seen | {inner.full_name})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_rule(method: str) -> None:
    assert method in RULES


def test_no_rule_is_without_a_method() -> None:
    assert RULES.keys() == METHODS.keys()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_methods_of_devices_are_open_to_devices(method: str) -> None:
    is_administrative = RULES[method] is objects.administrators_only
    assert is_administrative == (not ACCESS[method] & {Role.DEVICE, Role.ANYONE})


@pytest.mark.parametrize("method", sorted(name for name in METHODS if Role.DEVICE in ACCESS[name]))
def test_what_names_an_object_is_checked(method: str) -> None:
    """`GetUpload` names an update, and answers about the caller's own alone: see the walk over the network."""
    fields = list(fields_of(METHODS[method].input_type))
    named = {field.name for field in fields} & NAMES
    signed = any(
        field.message_type is not None and field.message_type.name == "SignedEnvelope"
        for field in fields
    )
    name = METHODS[method].name
    if named - {"update_id"} or (signed and name not in UNSIGNED_ENVELOPES):
        assert RULES[method] not in OPEN
    elif named:
        assert RULES[method] is not objects.names_nothing
