"""Tensors that stay on the device: kept in the key store, by training session, and never part of an update.

Which tensors these are is said by patterns of the training session (`transfer.local_tensors`) and of the device itself.
The device's own patterns bind the coordinator too: a version that holds such a tensor is not trained from.

Invariants: the tensors are written durably before the update of the same training is sent, so a device that restarts
goes on with what it trained last. A damaged file is dropped with a warning; the training function then begins with its
own initial values, as it does the first time.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qflare.tensors import Array, InvalidManifestError, Manifest
from qflare.tensors.local_tensors import is_local
from qflare.v1 import tensor_pb2
from qflare_client.errors import KeyStoreError, PrivacyError, TrainingFunctionError
from qflare_client.keystore.store import KeyStore
from qflare_client.models.array_files import arrays_of, encode, facts_of
from qflare_client.tasks import Task

_log = logging.getLogger(__name__)


class LocalTensors:
    """The local tensors of a device, by training session.

    Args:
        store: Key store of the device.
        patterns: The device's own patterns.
    """

    def __init__(self, store: KeyStore, patterns: Sequence[str]) -> None:
        self._store = store
        self._patterns = tuple(patterns)

    def require_absent(self, manifest: Manifest) -> None:
        """Refuse a version that holds a tensor which stays on this device.

        Raises:
            PrivacyError: It holds one.
        """
        for spec in manifest.tensors:
            if is_local(spec.name, self._patterns):
                raise PrivacyError(
                    f"tensor {spec.name!r} is part of the version, but stays on this device (local_tensors)"
                )

    def keep(self, task: Task, arrays: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """Keep those of the trained tensors that stay on the device, and return the others.

        Raises:
            TrainingFunctionError: They cannot be kept, because of their names, shapes or element types.
            KeyStoreError: They cannot be written.
        """
        patterns = (*self._patterns, *task.transfer.local_tensors)
        local = {
            name: np.asarray(array)
            for name, array in arrays.items()
            if isinstance(name, str) and is_local(name, patterns)
        }
        if not local:
            return arrays
        self.write(task.training_session_id, local)
        return {name: array for name, array in arrays.items() if name not in local}

    def write(self, training_session_id: str, arrays: Mapping[str, Array]) -> None:
        """Keep the local tensors of a training session durably, instead of those kept before.

        Raises:
            TrainingFunctionError: They cannot be kept, because of their names, shapes or element types.
            KeyStoreError: They cannot be written.
        """
        try:
            manifest = Manifest.from_arrays(arrays)
        except InvalidManifestError as error:
            raise TrainingFunctionError(f"local tensors: {error}") from error
        facts = {
            "training_session_id": training_session_id,
            "manifest": manifest.to_proto().SerializeToString().hex(),
        }
        self._store.write_secret(_name(training_session_id), encode(facts, arrays))

    def read(self, training_session_id: str) -> dict[str, Array]:
        """Return the local tensors of a training session; empty if there are none."""
        try:
            data = self._store.read_secret(_name(training_session_id))
        except KeyStoreError as error:
            _log.warning("local tensors dropped, they cannot be read: %s", error)
            return {}
        if data is None:
            return {}
        facts = facts_of(data)
        if facts.get("training_session_id") != training_session_id:
            _log.warning("local tensors dropped: damaged")
            return {}
        message = tensor_pb2.Manifest.FromString(bytes.fromhex(facts["manifest"]))
        return arrays_of(data, Manifest.from_proto(message))

    def forget(self, training_session_id: str) -> None:
        """Delete the local tensors of a training session."""
        self._store.delete(_name(training_session_id))


def _name(training_session_id: str) -> str:
    """Return the file name of a training session's tensors; text from the coordinator never becomes a path."""
    return "local-" + hashlib.sha256(training_session_id.encode()).hexdigest()[:32]
