"""Settings of a training session, as the dashboard shows and compares them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from qflare.training_settings import DURATION, leaves
from qflare.v1 import training_pb2
from qflare_server.serving.dashboard import formatting

Setting = tuple[str, str]
GENERAL = "session"


def settings(config: training_pb2.TrainingConfig) -> dict[str, str]:
    """Return every setting that has a value, by its path."""
    return dict(_set(config))


def sections(config: training_pb2.TrainingConfig) -> list[tuple[str, Sequence[Setting]]]:
    """Return the settings that have a value, by the policy that they belong to."""
    found: dict[str, list[Setting]] = {}
    for path, value in _set(config):
        section, _, name = path.rpartition(".")
        found.setdefault(section or GENERAL, []).append((name, value))
    return list(found.items())


def differences(found: Sequence[Mapping[str, str]]) -> list[tuple[str, Sequence[str]]]:
    """Return the settings that are not the same everywhere, each with its values."""
    paths = dict.fromkeys(path for item in found for path in item)
    rows = [(path, [item.get(path, formatting.NONE) for item in found]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _set(config: training_pb2.TrainingConfig) -> Iterator[Setting]:
    for path, field in leaves():
        owner: Any = config
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        value = getattr(owner, name)
        if owner.HasField(name) if field.has_presence else value:
            yield path, _text(field, value)


def _text(field: FieldDescriptor, value: Any) -> str:
    if field.message_type is not None and field.message_type.full_name == DURATION:
        return formatting.duration(value.ToTimedelta().total_seconds())
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return ", ".join(f"{key} = {_plain(entry)}" for key, entry in sorted(value.items()))
    if field.is_repeated:
        return ", ".join(map(_plain, value))
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field.enum_type.name).upper() + "_"
        return str(value) if named is None else named.name.removeprefix(prefix).lower()
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str | int):
        return str(value)
    entries = json_format.MessageToDict(value, preserving_proto_field_name=True)
    return " ".join(f"{key} {_plain(entry)}" for key, entry in entries.items())
