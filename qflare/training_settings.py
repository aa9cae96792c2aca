"""Settings of a training session as people write them: files, `KEY=VALUE` and the flags of both command lines.

A setting is named by its path in `qflare.v1.TrainingConfig`, such as `rounds.quorum`, or an entry of a map below it. A
file is a `TrainingConfig` in JSON (protobuf's JSON mapping) or, named `.toml`, the same fields in TOML. Its table
`simulation` belongs to `qflare-simulate` and is skipped here. What a flag or `--set` says overrides the file. Values
are not checked here beyond their type: `session validate` does so.
"""

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from qflare.command_line import seconds, whole
from qflare.files import parse_json
from qflare.v1 import training_pb2

SIMULATION: Final = "simulation"
"""Table of a file that holds settings of `qflare-simulate`, which a real session has no use for."""
DURATION: Final = "google.protobuf.Duration"
_TRUE_OR_FALSE: Final = {"true": True, "yes": True, "false": False, "no": False}
_FLOATS: Final = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}


class SettingError(ValueError):
    """A setting or a file of settings cannot be read.

    Args:
        cause: What is wrong.
        remedy: What is wanted instead.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.remedy = remedy


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe a training session."""
    parser.add_argument("--rounds", type=whole(0), default=0, help="rounds to run")
    parser.add_argument("--quorum", type=whole(0), default=0, help="updates required for a version")
    parser.add_argument(
        "--devices",
        type=whole(0),
        default=0,
        help="devices that take part in a round; without --quorum, the quorum is a majority of them",
    )
    parser.add_argument(
        "--deadline-s", type=seconds(0.001), help="maximum duration of a round in seconds"
    )
    parser.add_argument("--strategy", default="", help="default: fedavg")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        help="open only to devices of this group; repeatable",
    )
    parser.add_argument(
        "--sealed", action="store_true", help="seal updates and models end to end and at rest"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TrainingConfig as .json or .toml; flags override it",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="any setting, such as rounds.quorum=3; repeatable; docs/training-settings.md lists all",
    )


def from_flags(arguments: argparse.Namespace) -> training_pb2.TrainingConfig:
    """Return the configuration that the flags of `add_flags` describe.

    Raises:
        SettingError: A file or a setting cannot be read.
        OSError: The file cannot be read.
    """
    config = training_pb2.TrainingConfig()
    if arguments.config is not None:
        read_file(arguments.config, config)
    config.total_rounds = arguments.rounds or config.total_rounds
    config.rounds.quorum = arguments.quorum or config.rounds.quorum
    config.rounds.device_count = arguments.devices or config.rounds.device_count
    config.strategy.name = arguments.strategy or config.strategy.name
    config.transfer.sealed = arguments.sealed or config.transfer.sealed
    if arguments.group:
        config.groups[:] = arguments.group
    if arguments.deadline_s is not None:
        config.rounds.deadline.FromNanoseconds(int(arguments.deadline_s * 1e9))
    for setting in arguments.settings:
        apply(config, setting)
    return config


def from_mapping(settings: Mapping[str, object]) -> training_pb2.TrainingConfig:
    """Return a configuration from values by key, such as `{"rounds.quorum": 3}` or `{"rounds": {"quorum": 3}}`.

    Raises:
        SettingError: There is no such setting, or a value is not of its type.
    """
    config = training_pb2.TrainingConfig()
    for key, text in _flatten(settings, ""):
        apply(config, f"{key}={text}")
    return config


def _flatten(settings: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield key and text of each value."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        elif isinstance(value, list | tuple):
            is_text = all(isinstance(item, str) for item in value)
            yield key, ",".join(map(str, value)) if is_text else json.dumps(value)
        else:
            yield key, str(value)


def read_file(path: Path, config: training_pb2.TrainingConfig) -> None:
    """Read a file of settings into a configuration.

    Raises:
        SettingError: It is neither JSON nor TOML, or has a field that is unknown or of another type.
        OSError: The file cannot be read.
    """
    try:
        fields = parse_file(path)
        if not isinstance(fields, dict):
            raise SettingError(f"{path}: got {type(fields).__name__}", "an object of fields")  # noqa: TRY301
        fields.pop(SIMULATION, None)
        json_format.ParseDict(fields, config)
    except SettingError:
        raise
    except (ValueError, RecursionError, json_format.ParseError) as error:
        raise SettingError(f"{path}: {error}", "the fields of docs/training-settings.md") from error


def parse_file(path: Path) -> Any:
    """Return what a file holds: TOML if it is named `.toml`, otherwise JSON.

    Raises:
        ValueError: It is neither, or has a key twice in one object.
        RecursionError: It is nested too deeply.
        OSError: The file cannot be read.
    """
    text = path.read_text("utf-8")
    return tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)


def apply(config: training_pb2.TrainingConfig, setting: str) -> None:
    """Apply one `KEY=VALUE`.

    The last part of a key may be the name of an entry of a map. A list is written with
    commas between its items; a duration in seconds, as 90 or 90s; an enum by its name, with or without its prefix;
    a list of messages as JSON.

    Raises:
        SettingError: There is no such setting, or the value is not of its type.
    """
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise SettingError(f"got {setting[:100]!r}", "KEY=VALUE, such as rounds.quorum=3")
    message: Any = config
    for depth, part in enumerate(parts):
        field = _field(message.DESCRIPTOR, part, ".".join(parts[:depth]))
        rest = parts[depth + 1 :]
        if _is_map(field):
            _set_entry(message, field, key, ".".join(rest), text)
            return
        if not rest:
            _set(message, field, key, text)
            return
        if field.message_type is None or field.is_repeated or _is_duration(field):
            raise SettingError(
                f"{key}: {'.'.join(parts[: depth + 1])} has no parts",
                f"{'.'.join(parts[: depth + 1])}=VALUE",
            )
        message = getattr(message, field.name)


def leaves(
    descriptor: Descriptor = training_pb2.TrainingConfig.DESCRIPTOR, prefix: str = ""
) -> Iterator[tuple[str, FieldDescriptor]]:
    """Yield every setting with its path, in the order of the protos."""
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        if field.message_type is None or field.is_repeated or _is_duration(field):
            yield path, field
        else:
            yield from leaves(field.message_type, f"{path}.")


def type_name(field: FieldDescriptor) -> str:
    """Return what is written for a setting, in words."""
    if _is_map(field):
        return f"{_word(_entry_value(field))} for each name"
    if field.is_repeated:
        return "list in JSON" if field.message_type is not None else f"{_word(field)}, ..."
    return _word(field)


def _word(field: FieldDescriptor) -> str:
    if field.enum_type is not None:
        return " ".join(_short_names(field.enum_type))
    if _is_duration(field):
        return "seconds"
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return "text"
    return "number" if field.cpp_type in _FLOATS else "whole number"


def _field(descriptor: Descriptor, name: str, path: str) -> FieldDescriptor:
    """Return a field by its proto name or its JSON name."""
    for field in descriptor.fields:
        if name in (field.name, field.json_name):
            return field
    names = [field.name for field in descriptor.fields]
    near = difflib.get_close_matches(name, names, 3) or names
    whole_names = [f"{path}.{each}" if path else each for each in near]
    raise SettingError(
        f"there is no setting {f'{path}.{name}' if path else name}"[:300], ", ".join(whole_names)
    )


def _is_map(field: FieldDescriptor) -> bool:
    entry = field.message_type
    return entry is not None and entry.GetOptions().map_entry


def _entry_value(field: FieldDescriptor) -> FieldDescriptor:
    """Return the field of a map's values."""
    assert field.message_type is not None
    return field.message_type.fields_by_name["value"]


def _is_duration(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name == DURATION


def _set_entry(message: Any, field: FieldDescriptor, key: str, name: str, text: str) -> None:
    """Set one entry of a map."""
    if not name:
        raise SettingError(f"{key}: got no name", f"{key}.NAME={text}")
    getattr(message, field.name)[name] = _value(_entry_value(field), key, text)


def _set(message: Any, field: FieldDescriptor, key: str, text: str) -> None:
    """Set a field that is no map; a list is replaced."""
    if field.is_repeated:
        message.ClearField(field.name)
        value: Any = _items(field, key, text)
    elif field.message_type is not None and not _is_duration(field):
        below = ", ".join(f"{key}.{each.name}=..." for each in field.message_type.fields[:3])
        raise SettingError(f"{key} has parts", below)
    else:
        value = _value(field, key, text)
    try:
        json_format.ParseDict({field.name: value}, message)
    except json_format.ParseError as error:
        raise SettingError(f"{key}: got {text[:100]!r}", type_name(field)) from error


def _items(field: FieldDescriptor, key: str, text: str) -> list[Any]:
    if field.message_type is None:
        return [_value(field, key, item.strip()) for item in text.split(",") if item.strip()]
    try:
        items = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{key}: got {text[:100]!r}", "a list in JSON") from error
    return items if isinstance(items, list) else [items]


def _value(field: FieldDescriptor, key: str, text: str) -> Any:
    """Return a value for protobuf's JSON mapping."""
    text = text.strip() if field.cpp_type != FieldDescriptor.CPPTYPE_STRING else text
    wrong = SettingError(f"{key}: got {text[:100]!r}", type_name(field))
    if field.enum_type is not None:
        return _enum_number(field.enum_type, text, wrong)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return text
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if text.lower() not in _TRUE_OR_FALSE:
            raise wrong
        return _TRUE_OR_FALSE[text.lower()]
    if _is_duration(field):
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?s?", text):
            raise wrong
        return f"{text.removesuffix('s')}s"
    if not text.isascii():  # int() and float() take the digits of every script
        raise wrong
    try:
        return float(text) if field.cpp_type in _FLOATS else int(text)
    except ValueError as error:
        raise wrong from error


def _enum_number(enum: EnumDescriptor, text: str, wrong: SettingError) -> int:
    wanted = text.upper().replace("-", "_")
    for value in enum.values:
        if wanted in (value.name, value.name.removeprefix(_prefix(enum))):
            return int(value.number)
    raise wrong


def _short_names(enum: EnumDescriptor) -> list[str]:
    names = [value.name.removeprefix(_prefix(enum)).lower() for value in enum.values]
    return [name for name in names if name != "unspecified"]


def _prefix(enum: EnumDescriptor) -> str:
    """Return the prefix that all values of an enum share by convention: its name in upper snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
