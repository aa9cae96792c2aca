"""Tensors that stay on the device: kept in the key store, by training session, and never part of an update.

Which tensors these are is said by patterns of the training session (`transfer.local_tensors`) and of the device itself.
The device's own patterns bind the coordinator too: a version that holds such a tensor is not trained from.

Invariants: the tensors are written durably before the update of the same training is sent, and take effect when that
update is accepted, so what is local and what is shared never drift apart, whatever crashes. A damaged file is dropped
with a warning; the training function then begins with its own initial values, as it does the first time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qflare.tensors import Array, InvalidManifestError, Manifest
from qflare.tensors.local_tensors import is_local
from qflare_client.errors import PrivacyError, TrainingFunctionError
from qflare_client.models.staged_arrays import SecretFiles, StagedArrays
from qflare_client.tasks import Task


class LocalTensors:
    """The local tensors of a device, by training session.

    Args:
        store: Key store of the device.
        patterns: The device's own patterns.
        is_accepted: Returns whether the coordinator has accepted an update, given by its id.
    """

    def __init__(
        self, store: SecretFiles, patterns: Sequence[str], is_accepted: Callable[[str], bool]
    ) -> None:
        self._staged = StagedArrays(store, "local", is_accepted)
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

    def split(
        self, task: Task, arrays: Mapping[Any, Any]
    ) -> tuple[Mapping[Any, Any], dict[str, Array]]:
        """Return the trained tensors that travel, and those that stay on the device.

        Raises:
            TrainingFunctionError: Those that stay cannot be kept, because of their shapes or element types.
        """
        patterns = (*self._patterns, *task.transfer.local_tensors)
        local = {
            name: np.asarray(array)
            for name, array in arrays.items()
            if isinstance(name, str) and is_local(name, patterns)
        }
        try:
            Manifest.from_arrays(local)
        except InvalidManifestError as error:
            raise TrainingFunctionError(f"local tensors: {error}") from error
        return {name: array for name, array in arrays.items() if name not in local}, local

    def stage(self, training_session_id: str, update_id: str, arrays: Mapping[str, Array]) -> None:
        """Write local tensors, which take effect when an update is accepted; call this before sending the update.

        Raises:
            KeyStoreError: They cannot be written.
        """
        if arrays:
            self._staged.stage(training_session_id, update_id, arrays)

    def accept(self, training_session_id: str) -> None:
        """Put the staged tensors, if any, into effect after their update was accepted.

        Raises:
            KeyStoreError: They cannot be written.
        """
        self._staged.commit(training_session_id)

    def read(self, training_session_id: str) -> dict[str, Array]:
        """Return the local tensors of a training session; empty if there are none.

        Raises:
            QflareClientError: It is unknown whether an update was accepted, and the coordinator is unreachable.
        """
        self._staged.settle(training_session_id)
        return self._staged.read(training_session_id)
