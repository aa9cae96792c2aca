"""Frozen values have the columns of their tables, and hide what is secret."""

from typing import Any

import pytest

from qflare_server.storage import records, tables

SECRET = b"a secret"
LEFT_OUT = {"Payload": {"data"}}
JOINED = {"ModelUpdate": {"aggregated_version"}}
"""Fields that come from another table."""
RECORDS = [
    kind
    for kind in vars(records).values()
    if isinstance(kind, type) and kind.__module__ == records.__name__ and hasattr(kind, "_fields")
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda kind: kind.__name__)
def test_fields_are_the_columns_of_the_table(record: Any) -> None:
    table = getattr(tables, record.__name__).__table__
    nullable = {column.name for column in table.columns if column.nullable}

    joined = JOINED.get(record.__name__, set())
    own = {*table.columns.keys()} - LEFT_OUT.get(record.__name__, set())
    assert {*record._fields} == own | joined
    assert not own & joined
    for name, kind in record.__annotations__.items():
        assert ("None" in str(kind)) == (name in nullable | joined), name


@pytest.mark.parametrize("record", RECORDS, ids=lambda kind: kind.__name__)
def test_is_frozen(record: Any) -> None:
    value = record._make(range(len(record._fields)))

    with pytest.raises(AttributeError):
        setattr(value, record._fields[0], 1)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (records.UserToken, "token_hash"),
        (records.UserToken, "binding_key"),
        (records.Payload, "sealed_key"),
        (records.TrainingSession, "privacy_state"),
    ],
)
def test_secrets_are_not_shown(record: Any, field: str) -> None:
    value = record._make([None] * len(record._fields))._replace(**{field: SECRET})

    assert "secret" not in repr(value)
