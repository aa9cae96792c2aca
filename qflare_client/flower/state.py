"""Context.state of an app, kept on the device between messages and across restarts.

It is written when the app has answered a message, as by Flower's SuperNode, and is independent of what becomes of the
update. The file is a secret of a key store of its own, inside the device's: it is under the same passphrase, and never
leaves the device.

Layout: a safetensors file of bytes. The tensor `records` is JSON with the records in their order; each other tensor
holds the bytes of one array, as flwr serialized it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
from safetensors.numpy import load, save

from qflare_client.errors import KeyStoreError, TrainingFunctionError
from qflare_client.flower.library import flower
from qflare_client.keystore.store import KeyStore, SecretCoding

_RECORDS: Final = "records"


class AppState:
    """The states of an app, by training session.

    Args:
        folder: Folder of their key store.
        coding: Encoding of secrets.
    """

    def __init__(self, folder: Path, coding: SecretCoding) -> None:
        self._folder = folder
        self._coding = coding

    def read(self, training_session_id: str) -> Any:
        """Return the state as a RecordDict; an empty one if there is none.

        Raises:
            KeyStoreError: It cannot be read, or is damaged.
        """
        name = _name(training_session_id)
        if not (self._folder / name).exists():
            return flower().RecordDict()
        with KeyStore(self._folder, self._coding) as store:
            data = store.read_secret(name)
        try:
            return decode(data or b"")
        except (
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            raise KeyStoreError(f"{self._folder / name} is damaged: {error}") from error

    def write(self, training_session_id: str, state: Any) -> None:
        """Store a state durably, if it is not empty or replaces one.

        Raises:
            TrainingFunctionError: It holds something that cannot be kept.
            KeyStoreError: It cannot be written.
        """
        name = _name(training_session_id)
        if len(state) or (self._folder / name).exists():
            data = encode(state)
            self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with KeyStore(self._folder, self._coding) as store:
                store.write_secret(name, data)


def encode(state: Any) -> bytes:
    """Return the bytes of a RecordDict.

    Raises:
        TrainingFunctionError: It holds a record that cannot be kept.
    """
    blobs: dict[str, Any] = {}
    records = [_record(name, record, blobs) for name, record in state.items()]
    text = json.dumps(records, allow_nan=True).encode()
    blobs[_RECORDS] = np.frombuffer(text, np.uint8)
    return save(blobs)


def decode(data: bytes) -> Any:
    """Return the RecordDict of bytes that `encode` made.

    Raises:
        ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError: They are not such bytes.
    """
    blobs = load(data)
    state = flower().RecordDict()
    for entry in json.loads(blobs[_RECORDS].tobytes()):
        state[entry["name"]] = _restored(entry, blobs)
    return state


def _name(training_session_id: str) -> str:
    return f"state-{training_session_id or 'any'}"


def _record(name: str, record: Any, blobs: dict[str, Any]) -> dict[str, Any]:
    app = flower()
    if isinstance(record, app.ArrayRecord):
        return {"name": name, "kind": "arrays", "values": _arrays(record, blobs)}
    for kind, wanted in (("metrics", app.MetricRecord), ("config", app.ConfigRecord)):
        if isinstance(record, wanted):
            values = [[key, _plain(value)] for key, value in record.items()]
            return {"name": name, "kind": kind, "values": values}
    got = type(record).__name__
    raise TrainingFunctionError(f"Context.state: record {name!r}: {got} cannot be kept")


def _arrays(record: Mapping[str, Any], blobs: dict[str, Any]) -> list[dict[str, Any]]:
    described = []
    for name, array in record.items():
        key = str(len(blobs))
        blobs[key] = np.frombuffer(array.data, np.uint8)
        facts = {"dtype": array.dtype, "shape": list(array.shape), "stype": array.stype}
        described.append({"name": name, "blob": key, **facts})
    return described


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; bytes as {"hex": ...}."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _restored(entry: dict[str, Any], blobs: dict[str, Any]) -> Any:
    app = flower()
    if entry["kind"] == "arrays":
        record = app.ArrayRecord()
        for facts in entry["values"]:
            record[facts["name"]] = app.Array(
                dtype=facts["dtype"],
                shape=tuple(facts["shape"]),
                stype=facts["stype"],
                data=blobs[facts["blob"]].tobytes(),
            )
        return record
    kind = {"metrics": app.MetricRecord, "config": app.ConfigRecord}[entry["kind"]]
    return kind({key: _unplain(value) for key, value in entry["values"]})


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return [_unplain(item) for item in value] if isinstance(value, list) else value
