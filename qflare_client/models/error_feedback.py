"""Error feedback: elements omitted from a top-k update are added to the device's next update of the training session.

A device sends the k largest elements of `delta + residual` and keeps the rest as the next residual, so small changes
accumulate until they are sent. The residual is held in memory and in the key store. It is protected like the keys,
because it reveals as much about the data as an update does.

Invariants: a residual is written before its update is sent, and takes effect when the update is accepted; if a crash or
an outage leaves this open, the device asks the coordinator. The sum of the sent updates and the residual therefore
equals the sum of the deltas, except for the rounding of one addition per element and update (to float32, or float64 for
float64 tensors). A residual that is damaged or has another layout is dropped with a warning.

It does not restore elements of updates that were accepted but are not in a version (because the round failed, or a
safeguard refused the update).

Sources: Stich et al. 2018, arXiv:1809.07599, algorithm 1 (memory); Karimireddy et al. 2019, arXiv:1901.09847,
algorithm 2 (error feedback).
"""

import threading
from collections.abc import Callable, Mapping

import numpy as np

from qflare.tensors import Array, DType, Manifest, TensorSpec
from qflare.tensors.encodings import INDEX_SUFFIX, VALUE_SUFFIX, narrow
from qflare_client.errors import KeyStoreError
from qflare_client.models.staged_arrays import SecretFiles, StagedArrays

Residual = dict[str, Array]


def residual_manifest(base: Manifest) -> Manifest:
    """Return the layout of a residual: the floating-point tensors, as float32, or float64 if they are float64."""
    return Manifest(
        tuple(
            TensorSpec(
                spec.name,
                DType.FLOAT64 if spec.dtype is DType.FLOAT64 else DType.FLOAT32,
                spec.shape,
            )
            for spec in base.tensors
            if spec.dtype.is_float
        )
    )


def corrected(
    delta: Mapping[str, Array], residual: Mapping[str, Array], base: Manifest
) -> Residual:
    """Return `delta + residual` of the floating-point tensors, as new arrays in the residual's layout.

    Args:
        delta: Tensors of the base manifest.
        residual: Residual of earlier updates; empty for none.
        base: The manifest of the model.
    """
    wide: Residual = {}
    for spec in residual_manifest(base).tensors:
        wide[spec.name] = np.array(delta[spec.name], spec.dtype.numpy, order="C")
        if spec.name in residual:
            wide[spec.name] += residual[spec.name]
    return wide


def selectable(wide: Mapping[str, Array], delta: Mapping[str, Array], base: Manifest) -> Residual:
    """Return the corrected tensors in the model's element types, and the other tensors of the delta unchanged."""
    return {
        spec.name: narrow(wide[spec.name], spec.dtype) if spec.dtype.is_float else delta[spec.name]
        for spec in base.tensors
    }


def subtract_sent(wide: Residual, encoded: Mapping[str, Array]) -> None:
    """Turn corrected tensors into the next residual in place, by subtracting the elements that a top-k update sends."""
    for name, array in wide.items():
        flat = array.reshape(-1)
        flat[encoded[name + INDEX_SUFFIX]] -= encoded[name + VALUE_SUFFIX]


class ErrorFeedback:
    """The residuals of a device, by training session. Thread-safe for different training sessions.

    Args:
        store: Key store of the device.
        is_accepted: Returns whether the coordinator has accepted an update, given by its id.
    """

    def __init__(self, store: SecretFiles, is_accepted: Callable[[str], bool]) -> None:
        self._staged = StagedArrays(store, "residual", is_accepted)
        self._lock = threading.Lock()
        self._held: dict[str, tuple[str, Residual]] = {}

    def residual(self, training_session_id: str, base: Manifest) -> Residual:
        """Return the residual of earlier updates; empty if there is none. Read-only.

        Raises:
            QflareClientError: It is unknown whether an update was accepted, and the coordinator is unreachable.
            KeyStoreError: The residual of a settled update cannot be written.
        """
        if self._staged.settle(training_session_id):
            self._drop(training_session_id)
        layout = residual_manifest(base)
        with self._lock:
            held = self._held.get(training_session_id)
        if held is not None and held[0] == layout.layout_digest:
            return held[1]
        found = self._staged.read(training_session_id, layout)
        if found:
            with self._lock:
                self._held[training_session_id] = layout.layout_digest, found
        return found

    def stage(self, training_session_id: str, update_id: str, residual: Residual) -> None:
        """Stage the residual that takes effect when an update is accepted; call this before sending the update.

        Raises:
            KeyStoreError: It cannot be written.
        """
        self._staged.stage(training_session_id, update_id, residual)

    def commit(self, training_session_id: str, residual: Residual) -> None:
        """Commit the staged residual after its update was accepted.

        Raises:
            KeyStoreError: It cannot be written.
        """
        if not self._staged.commit(training_session_id):
            raise KeyStoreError("no residual is staged for the accepted update")
        digest = Manifest.from_arrays(residual).layout_digest
        with self._lock:
            self._held[training_session_id] = digest, residual

    def accept(self, training_session_id: str) -> None:
        """Commit the staged residual, if any, of an update that an earlier process sent.

        Raises:
            KeyStoreError: It cannot be written.
        """
        if self._staged.commit(training_session_id):
            self._drop(training_session_id)

    def forget(self, training_session_id: str) -> None:
        """Delete the residual of a training session that has ended."""
        self._drop(training_session_id)
        self._staged.forget(training_session_id)

    def _drop(self, training_session_id: str) -> None:
        with self._lock:
            self._held.pop(training_session_id, None)
