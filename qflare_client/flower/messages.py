"""Messages of Flower made of tasks of QFLARE, and results made of the replies.

An app of the message API gets the records `arrays` and `config`, and answers with one record of arrays and one of
metrics. An app with a `client_fn` (Client, NumPyClient) gets and answers the records of Flower's older calls.

What a reply holds beside that is not carried over: each kind is logged once.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qflare.tensors import Array, DType
from qflare_client.errors import TaskFailedError, TrainingFunctionError
from qflare_client.flower.library import flower
from qflare_client.tasks import TrainingTask

_log = logging.getLogger(__name__)

_SERVER_NODE_ID: Final = 1
_TTL_S: Final = 10 * 365 * 86_400.0
"""A device may train for as long as its round is open; the deadline is the round's."""

_WHOLE: Final = 2.0**53
_OLD_COUNT: Final = "num_examples"


@dataclass
class Dialect:
    """How one app is spoken to.

    Args:
        is_old: It is called by a `client_fn`.
        weight_key: Metric of the example count, in the message API.
    """

    is_old: bool
    weight_key: str

    def __post_init__(self) -> None:
        """Nothing has been logged yet."""
        self._logged: set[str] = set()

    def message(
        self, kind: str, arrays: Mapping[str, Array], task: TrainingTask, run_id: int, node_id: int
    ) -> Any:
        """Return the message of a task.

        Args:
            kind: train or evaluate.
            arrays: The version's arrays; those of bfloat16 are passed as float32, which holds them exactly.
            task: Its settings.
            run_id: Number of the training session.
            node_id: Number of the device.
        """
        app = flower()
        prefix = {"train": "fitins.", "evaluate": "evaluateins."}[kind] if self.is_old else ""
        content = app.RecordDict(
            {
                f"{prefix}{'parameters' if self.is_old else 'arrays'}": _array_record(arrays),
                f"{prefix}config": app.ConfigRecord(_settings(task)),
            }
        )
        metadata = app.Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=_SERVER_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id=str(task.round_number),
            created_at=time.time(),
            ttl=_TTL_S,
            message_type=kind,
        )
        return app.Message(content=content, metadata=metadata)

    def trained(
        self, reply: Any, arrays: Mapping[str, Array]
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        """Return what the reply to a training message says: arrays, example count, metrics.

        Args:
            reply: The reply.
            arrays: The arrays of the message.

        Raises:
            TaskFailedError: The app answered with an error.
            TrainingFunctionError: The session cannot carry what it answered.
        """
        content = _content(reply)
        if self.is_old:
            self._require_success(content, "fitres")
            count = _count(
                content.metric_records["fitres.num_examples"].get(_OLD_COUNT), _OLD_COUNT
            )
            metrics = self._numbers(content.config_records["fitres.metrics"])
            record = content.array_records["fitres.parameters"]
        else:
            count, metrics = self._measured(content)
            record = _only("array record", content.array_records)
        return _named(record, arrays), count, metrics

    def evaluated(self, reply: Any) -> tuple[int, dict[str, float]]:
        """Return what the reply to an evaluation message says: example count, metrics.

        Raises:
            TaskFailedError: The app answered with an error.
            TrainingFunctionError: The session cannot carry what it answered.
        """
        content = _content(reply)
        if not self.is_old:
            return self._measured(content)
        self._require_success(content, "evaluateres")
        records = content.metric_records
        count = _count(records["evaluateres.num_examples"].get(_OLD_COUNT), _OLD_COUNT)
        loss = float(records["evaluateres.loss"]["loss"])
        return count, {"loss": loss, **self._numbers(content.config_records["evaluateres.metrics"])}

    def _measured(self, content: Any) -> tuple[int, dict[str, float]]:
        record = _only("metric record", content.metric_records)
        for name in content.config_records:
            self._log_once(f"record {name!r} of the reply is a ConfigRecord")
        count = _count(record.get(self.weight_key), self.weight_key)
        others = {name: value for name, value in record.items() if name != self.weight_key}
        return count, self._numbers(others)

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return metrics as numbers; the entries of a list as ``name.0``, ``name.1`` and so on."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            for key, entry in _entries(name, value):
                if isinstance(entry, bool | int | float):
                    numbers[key] = float(entry)
                else:
                    self._log_once(f"metric {key!r} is no number but {type(entry).__name__}")
        return numbers

    def _require_success(self, content: Any, which: str) -> None:
        code = content.config_records[f"{which}.status"]["code"]
        if code:
            meaning = _MEANINGS.get(code, "")
            raise TaskFailedError(f"the Flower client answered {which} with status {code}{meaning}")

    def _log_once(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            _log.warning("not carried over from the Flower app: %s", what)


_MEANINGS: Final = {3: ": it has no fit", 4: ": it has no evaluate; run it without evaluation"}


def _array_record(arrays: Mapping[str, Array]) -> Any:
    """Return arrays as a record; names that are all numbers are in the order of the numbers, others as they are."""
    app = flower()
    names = list(arrays)
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    record = app.ArrayRecord()
    for name in names:
        array = arrays[name]
        is_numpy = array.dtype.kind in "biuf"
        record[name] = app.Array(array if is_numpy else array.astype(np.float32))
    return record


def _settings(task: TrainingTask) -> dict[str, Any]:
    """Return the settings of a session as an app's config; whole numbers as int, since counts arrive as float."""
    number = task.round_number or task.base_version
    return {
        "server-round": number,
        "server_round": number,
        "local-epochs": task.local_epochs,
        "batch-size": task.batch_size,
        "learning-rate": task.learning_rate,
        "lr": task.learning_rate,
        **task.labels,
        **{name: _whole(value) for name, value in task.parameters.items()},
    }


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) <= _WHOLE else value


def _content(reply: Any) -> Any:
    if reply.has_error():
        # The reason of Flower's error is free text, and may hold data.
        _log.error("the Flower app answered with an error: %s", reply.error.reason)
        raise TaskFailedError(f"the Flower app answered with error code {reply.error.code}")
    return reply.content


def _only(what: str, records: Mapping[str, Any]) -> Any:
    if len(records) != 1:
        names = ", ".join(map(repr, records)) or "none"
        raise TrainingFunctionError(f"the reply of the Flower app: want one {what}, got {names}")
    return next(iter(records.values()))


def _count(value: Any, key: str) -> int:
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    got = "none" if value is None else repr(value)
    raise TrainingFunctionError(
        f"the reply of the Flower app: metric {key!r}: want a count, got {got}"
    )


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{name}.{index}", entry) for index, entry in enumerate(value))
    else:
        yield name, value


def _named(record: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays of a record by the names of the version: by name, or by position if the record is a list."""
    decoded = {name: _decoded(name, array) for name, array in record.items()}
    if decoded.keys() == arrays.keys() or not _is_list(decoded):
        return decoded
    if len(decoded) != len(arrays):
        raise TrainingFunctionError(
            f"the reply of the Flower app: got {len(decoded)} arrays, want {len(arrays)}"
        )
    names = sorted(arrays, key=int) if all(name.isdecimal() for name in arrays) else list(arrays)
    return dict(zip(names, decoded.values(), strict=True))


def _is_list(arrays: Mapping[str, Any]) -> bool:
    return list(arrays) == [str(index) for index in range(len(arrays))]


def _decoded(name: str, array: Any) -> Array:
    if array.stype != "numpy.ndarray":
        raise TrainingFunctionError(
            f"array {name!r}: serialized as {array.stype!r}, the session carries numpy.ndarray"
        )
    decoded: Array = array.numpy()
    try:
        DType.from_numpy(decoded.dtype)
    except ValueError as error:
        raise TrainingFunctionError(
            f"array {name!r}: the session cannot carry it: {error}"
        ) from error
    return decoded
