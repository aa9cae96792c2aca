"""Configurations of training sessions: serialization for storage, and a cache of parsed ones."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import json_format
from sqlalchemy.orm import Session

from qflare.v1 import training_pb2

INFO_KEY: Final = "qflare_parsed_configs"
"""Key of the `ParsedConfigs` in a session's `info`."""

MAX_PARSED: Final = 256


def to_json(config: training_pb2.TrainingConfig) -> dict[str, Any]:
    """Serialize a configuration for storage."""
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def from_json(stored: Mapping[str, Any]) -> training_pb2.TrainingConfig:
    """Parse a stored configuration.

    Raises:
        json_format.ParseError: The text is not a configuration.
    """
    return json_format.ParseDict(dict(stored), training_pb2.TrainingConfig())


class ParsedConfigs:
    """Cache of a database's recently parsed configurations; thread-safe.

    Parsing takes a quarter of a millisecond, which every statement on a training session would pay.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parsed: OrderedDict[str, tuple[Mapping[str, Any], training_pb2.TrainingConfig]] = (
            OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._parsed)

    def get(
        self, training_session_id: str, stored: Mapping[str, Any]
    ) -> training_pb2.TrainingConfig:
        """Return the configuration of a training session; it must not be modified.

        Raises:
            json_format.ParseError: The stored text is not a configuration.
        """
        with self._lock:
            known = self._parsed.get(training_session_id)
            if known is not None and known[0] == stored:
                self._parsed.move_to_end(training_session_id)
                return known[1]
        parsed = from_json(stored)
        with self._lock:
            self._parsed[training_session_id] = (stored, parsed)
            while len(self._parsed) > MAX_PARSED:
                self._parsed.popitem(last=False)
        return parsed


def parsed_config(
    session: Session, training_session_id: str, stored: Mapping[str, Any]
) -> training_pb2.TrainingConfig:
    """Return the configuration of a training session, from the database's cache if it has one.

    Raises:
        json_format.ParseError: The stored text is not a configuration.
    """
    known: ParsedConfigs | None = session.info.get(INFO_KEY)
    return from_json(stored) if known is None else known.get(training_session_id, stored)
