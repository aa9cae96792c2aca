"""Every setting of a training session can be written as KEY=VALUE, and what cannot is refused with what is wanted."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from qflare.training_settings import (
    SettingError,
    add_flags,
    apply,
    from_flags,
    leaves,
    read_file,
    type_name,
)
from qflare.v1 import training_pb2

SAMPLES = {
    "whole number": "3",
    "number": "0.25",
    "text": "word",
    "true or false": "true",
    "seconds": "90",
    "list in JSON": "[{}]",
    "text, ...": "a,b",
    "number, ...": "0.25,0.5",
    "whole number, ...": "64,32",
    "number for each name": "0.5",
    "text for each name": "word",
}


def configured(*settings: str) -> training_pb2.TrainingConfig:
    config = training_pb2.TrainingConfig()
    for setting in settings:
        apply(config, setting)
    return config


def value(config: training_pb2.TrainingConfig, path: str) -> Any:
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("path", "field"), list(leaves()), ids=[path for path, _ in leaves()])
def test_every_setting_can_be_set(path: str, field: FieldDescriptor) -> None:
    kind = type_name(field)
    text = kind.split()[-1] if field.enum_type is not None else SAMPLES[kind]
    key = f"{path}.name" if kind.endswith("for each name") else path

    config = configured(f"{key}={text}")

    assert value(config, path)
    camel = "".join(word.capitalize() or "_" for word in path.split("_"))
    parts = [each[:1].lower() + each[1:] for each in camel.split(".")]
    if not kind.endswith("for each name"):
        assert configured(f"{'.'.join(parts)}={text}") == config, "JSON names work as well"


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("rounds.quorm=3", "rounds.quorum"),
        ("round.quorum=3", "rounds"),
        ("rounds=3", "rounds.quorum=..., rounds.target=..., rounds.deadline=..."),
        ("rounds.quorum.x=3", "rounds.quorum=VALUE"),
        ("rounds.deadline.seconds=3", "rounds.deadline=VALUE"),
        ("groups.x=3", "groups=VALUE"),
        ("rounds.quorum=many", "whole number"),
        ("rounds.quorum=", "whole number"),
        ("rounds.quorum=1e9", "whole number"),
        ("rounds.quorum=99999999999999", "whole number"),
        ("rounds.quorum=٣", "whole number"),
        ("selection.fraction=३", "number"),
        ("rounds.deadline=٣", "seconds"),
        ("rounds.deadline=1h", "seconds"),
        ("rounds.deadline=-1", "seconds"),
        ("selection.fraction=half", "number"),
        ("transfer.sealed=maybe", "true or false"),
        ("transfer.update_kind=fast", "weights delta"),
        ("strategy.parameters=3", "strategy.parameters.NAME=3"),
        ("strategy.parameters.beta=x", "number"),
        ("release.bounds=0.8", "list in JSON"),
        ("release.bounds=accuracy", "a list in JSON"),
        ('release.bounds=[{"metrik": "a"}]', "list in JSON"),
        ('release.bounds=[{"metric": "a", "min_value": 1, "min_value": 2}]', "a list in JSON"),
        ('release.bounds=[{"metric": "a", "min_value": 1, "minValue": 2}]', "list in JSON"),
        ("quorum", "KEY=VALUE, such as rounds.quorum=3"),
        ("=3", "KEY=VALUE, such as rounds.quorum=3"),
        ("rounds..quorum=3", "KEY=VALUE, such as rounds.quorum=3"),
    ],
)
def test_what_is_no_setting_is_refused_with_what_is_wanted(setting: str, wanted: str) -> None:
    with pytest.raises(SettingError) as raised:
        configured(setting)

    assert raised.value.remedy == wanted


def test_a_list_is_replaced_and_a_map_is_added_to() -> None:
    config = configured(
        "groups=a,b",
        "groups=c",
        "strategy.parameters.one=1",
        "strategy.parameters.two=2",
        "device_training.labels.a.b=x=y",
    )

    assert list(config.groups) == ["c"]
    assert dict(config.strategy.parameters) == {"one": 1, "two": 2}
    assert dict(config.device_training.labels) == {"a.b": "x=y"}


def test_an_enum_is_named_in_any_spelling() -> None:
    names = ("top_k", "top-k", "TOP_K", "ENCODING_TOP_K")
    found = {
        configured(f"transfer.update_encoding={name}").transfer.update_encoding for name in names
    }

    assert found == {training_pb2.ENCODING_TOP_K}


TOML = """
totalRounds = 7
groups = ["a"]
[rounds]
quorum = 2
deadline = "90s"
[strategy]
name = "krum"
parameters = { byzantine_count = 1 }
"""
JSON = """{"total_rounds": 7, "groups": ["a"], "rounds": {"quorum": 2, "deadline": "90s"},
"strategy": {"name": "krum", "parameters": {"byzantine_count": 1}}}"""


def test_flags_override_files_and_settings_override_flags(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(JSON)
    parser = argparse.ArgumentParser()
    add_flags(parser)

    flags = "--quorum 3 --rounds 8 --set rounds.target=5 --set total_rounds=9"
    toml, as_json = (
        from_flags(parser.parse_args([f"--config={tmp_path / name}", *flags.split()]))
        for name in ("a.toml", "a.json")
    )

    assert toml == as_json
    assert (toml.total_rounds, toml.rounds.quorum, toml.rounds.target) == (9, 3, 5)
    assert (toml.rounds.deadline.seconds, toml.strategy.name) == (90, "krum")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"rounds": 3}',
        '{"totalRonds": 3}',
        '{"total_rounds": 3, "total_rounds": 4}',
        '{"rounds": {"quorum": 3, "quorum": 4}}',
        "\\ud800",
        "7",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.toml"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if (name, text) == ("a.toml", ""):
        return  # an empty table: every default

    with pytest.raises(SettingError):
        read_file(tmp_path / name, training_pb2.TrainingConfig())
