"""Constraints of request fields: each kind at its bound and past it, and no field of a request without a bound."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from qflare.protocol.constraints import (
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_ITEMS,
    DEFAULT_MAX_KEY,
    DEFAULT_MAX_TEXT,
    MAX_DURATION_S,
    MAX_TIMESTAMP_S,
    MAX_VIOLATIONS,
    MIN_TIMESTAMP_S,
    constraint_of,
    find_field_violations,
    find_violations,
)
from qflare.v1 import admin_service_pb2 as admin
from qflare.v1 import constraints_pb2, coordinator_service_pb2, security_pb2, training_pb2

DIGEST = "0a" * 32


def session(name: str = "trial", **config: Any) -> admin.CreateTrainingSessionRequest:
    return admin.CreateTrainingSessionRequest(
        name=name, config=training_pb2.TrainingConfig(**config)
    )


def devices(**fields: Any) -> admin.ListDevicesRequest:
    return admin.ListDevicesRequest(**fields)


def watch(**fields: Any) -> admin.WatchTrainingSessionRequest:
    return admin.WatchTrainingSessionRequest(training_session_id="x", **fields)


def fields_of(message: Message) -> list[str]:
    return [violation.field for violation in find_violations(message)]


@pytest.mark.parametrize(
    "request_",
    [
        session("n" * 200),
        session(device_training={"learning_rate": 1e6, "parameters": {"p" * 100: -1e300}}),
        session(selection={"device_types": ["phone"] * DEFAULT_MAX_ITEMS, "seed": 2**53}),
        session(rounds={"deadline": {"nanos": 1_000_000}}),
        session(safeguards={"min_cosine_similarity": -1}),
        session(device_training={"labels": {"text": "two\nlines\t\u202e"}}),
        devices(page_size=1000, page_token="p" * 4096),
        devices(seen_after_time={"seconds": MAX_TIMESTAMP_S, "nanos": 999_999_999}),
        devices(seen_after_time={"seconds": MIN_TIMESTAMP_S}),
        watch(known_round_number=0, duration={"seconds": MAX_DURATION_S}),
        admin.GetDeviceRequest(device_id="\N{SNOWMAN}" * DEFAULT_MAX_TEXT),
        security_pb2.EvaluationStatement(
            training_session_id="x",
            device_id="d",
            example_count=2**40,
            metrics={f"m{number}": -1.5 for number in range(DEFAULT_MAX_ITEMS)},
        ),
        security_pb2.SignedEnvelope(payload=bytes(DEFAULT_MAX_BYTES)),
        security_pb2.Signature(key_id=DIGEST),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_at_its_bounds_breaks_nothing(request_: Message) -> None:
    assert find_violations(request_) == []


@pytest.mark.parametrize(
    ("request_", "field", "wanted"),
    [
        (session(""), "name", "required"),
        (session("n" * 201), "name", "at most 200"),
        (session("a\0b"), "name", "printable"),
        (session("two\nlines"), "name", "printable"),
        (session("\u202egnp"), "name", "printable"),
        (
            session(device_training={"labels": {"a": "b\0"}}),
            "config.device_training.labels['a']",
            "NUL",
        ),
        (session(total_rounds=-1), "config.total_rounds", "at least 0"),
        (session(total_rounds=1_000_001), "config.total_rounds", "at most 1000000"),
        (session(selection={"fraction": 1.5}), "config.selection.fraction", "at most 1"),
        (session(selection={"fraction": -0.5}), "config.selection.fraction", "above 0"),
        (session(privacy={"delta": 1}), "config.privacy.delta", "below 1"),
        (session(privacy={"clip_norm": math.inf}), "config.privacy.clip_norm", "above 0"),
        (
            session(strategy={"parameters": {"a": math.nan}}),
            "config.strategy.parameters['a']",
            "finite",
        ),
        (session(strategy={"parameters": {"": 1}}), "config.strategy.parameters['']", "1 to 100"),
        (
            session(strategy={"parameters": {"p" * (DEFAULT_MAX_KEY + 1): 1}}),
            f"config.strategy.parameters['{'p' * 40}']",
            "1 to 100",
        ),
        (
            session(transfer={"update_encoding": 9}),
            "config.transfer.update_encoding",
            "ENCODING_NONE",
        ),
        (session(rounds={"deadline": {"nanos": 1}}), "config.rounds.deadline", "at least 0.001"),
        (session(rounds={"deadline": {"seconds": -1}}), "config.rounds.deadline", "seconds"),
        (session(rounds={"deadline": {"nanos": 10**9}}), "config.rounds.deadline", "nanos"),
        (
            session(selection={"device_types": ["a", "b\n"]}),
            "config.selection.device_types[1]",
            "printable",
        ),
        (
            session(selection={"capabilities": [{"capability": "a"}, {"value": 1}]}),
            "config.selection.capabilities[1].capability",
            "required",
        ),
        (
            devices(capabilities=[training_pb2.CapabilityFilter()] * (DEFAULT_MAX_ITEMS + 1)),
            "capabilities",
            "at most 64",
        ),
        (devices(page_size=1001), "page_size", "at most 1000"),
        (devices(state=17), "state", "DEVICE_STATE_ACTIVE"),
        (
            devices(seen_after_time={"seconds": MAX_TIMESTAMP_S + 1}),
            "seen_after_time",
            "years 1 to 9999",
        ),
        (devices(seen_after_time={"nanos": -1}), "seen_after_time", "years 1 to"),
        (
            watch(duration={}),
            "duration",
            "above 0",
        ),
        (
            admin.DescribeGlobalModelRequest(training_session_id="x", version=-1),
            "version",
            "at least 0",
        ),
        (admin.GetDeviceRequest(device_id="d" * 256), "device_id", "at most 255"),
        (coordinator_service_pb2.RotateKeysRequest(), "rotation", "required"),
        (security_pb2.SignedEnvelope(payload=bytes(65_537)), "payload", "at most 65536"),
        (security_pb2.Signature(key_id="A" * 64), "key_id", "64 lower-case hex"),
        (
            security_pb2.UpdateStatement(
                training_session_id="x",
                round_number=1,
                update_id="0F0F0F0F-0000-0000-0000-000000000000",
                device_id="d",
                example_count=1,
            ),
            "update_id",
            "UUID",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_constraint_is_named_with_its_path(
    request_: Message, field: str, wanted: str
) -> None:
    (violation,) = find_violations(request_, "header.")

    assert violation.field == f"header.{field}"
    assert wanted in violation.description


def test_all_violations_of_a_message_come_together() -> None:
    request = session(
        "",
        total_rounds=-1,
        selection={"fraction": 2, "capabilities": [{}]},
        transfer={"update_encoding": 9, "payload_retention": 77},
    )
    request.request_id = "r" * 101

    assert fields_of(request) == [
        "name",
        "config.total_rounds",
        "config.selection.fraction",
        "config.selection.capabilities[0].capability",
        "config.transfer.update_encoding",
        "config.transfer.payload_retention",
        "request_id",
    ]


def test_violations_are_bounded_and_short() -> None:
    labels = {"\x1b" + "k" * 10_000 + str(number): "\0" for number in range(900)}

    found = find_violations(session(device_training={"labels": labels}))

    assert len(found) == MAX_VIOLATIONS
    assert all(len(violation.field) < 200 for violation in found)
    assert all(text.isprintable() for violation in found for text in violation)


@pytest.mark.parametrize(
    "name", [field.name for field in security_pb2.UpdateStatement.DESCRIPTOR.fields]
)
def test_one_field_is_checked_as_in_its_message(name: str) -> None:
    statement = security_pb2.UpdateStatement(
        realm="r" * 999, base_version=-1, payload_digest="x", metrics={"\n": math.nan}
    )
    whole = find_violations(statement)

    assert find_field_violations(statement, name) == [
        found for found in whole if found.field.partition("[")[0] == name
    ]


def test_a_field_that_its_method_checks_is_left_to_it() -> None:
    request = admin.UploadInitialModelRequest()
    request.chunk.index = -1
    request.header.training_session_id = "x"
    request.header.manifest.tensors.add(name="\0", dtype=99)

    assert find_violations(request) == []


# The constraints themselves


def services() -> Iterator[MethodDescriptor]:
    for module in (admin, coordinator_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def request_types() -> Iterator[Descriptor]:
    """Yield every message type that a request of any method can hold."""
    waiting = [method.input_type for method in services()]
    seen: set[str] = set()
    while waiting:
        kind = waiting.pop()
        if kind.full_name in seen:
            continue
        seen.add(kind.full_name)
        yield kind
        waiting += [field.message_type for field in kind.fields if field.message_type is not None]


def annotated() -> Iterator[FieldDescriptor]:
    for kind in request_types():
        yield from (
            field
            for field in kind.fields
            if field.GetOptions().HasExtension(constraints_pb2.constraint)
        )


NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
}


def value_of(field: FieldDescriptor) -> FieldDescriptor:
    """Return the field that holds the values: of a map its value."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return kind.fields_by_name["value"]
    return field


def is_number(field: FieldDescriptor) -> bool:
    kind = field.message_type
    is_duration = kind is not None and kind.full_name == "google.protobuf.Duration"
    return is_duration or field.cpp_type in NUMBERS


def is_map(field: FieldDescriptor) -> bool:
    return value_of(field) is not field


FITS: dict[str, Callable[[FieldDescriptor], bool]] = {
    "required": lambda _: True,
    "checked_by_method": lambda field: field.message_type is not None,
    "form": lambda field: value_of(field).type == FieldDescriptor.TYPE_STRING,
    "max_length": lambda field: value_of(field).cpp_type == FieldDescriptor.CPPTYPE_STRING,
    "max_items": lambda field: field.is_repeated,
    "max_key_length": is_map,
    "at_least": lambda field: is_number(value_of(field)),
    "at_most": lambda field: is_number(value_of(field)),
    "above": lambda field: is_number(value_of(field)),
    "below": lambda field: is_number(value_of(field)),
}


def test_every_annotation_fits_the_type_of_its_field() -> None:
    assert set(FITS) == {field.name for field in constraints_pb2.Constraint.DESCRIPTOR.fields}
    fields = list(annotated())
    wrong = [
        (field.full_name, option.name)
        for field in fields
        for option, _ in constraint_of(field).ListFields()
        if not FITS[option.name](field)
    ]
    assert len(fields) > 80
    assert wrong == []
