"""Builds updates and evaluation reports: checks the arrays, encodes the payload, and signs the statement.

It does not retry or resume uploads (see `qflare_client.models.upload`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import StatementError, sign_evaluation, sign_update
from qflare.ids import new_update_id
from qflare.tensors import Array, InvalidManifestError, Manifest, NonFiniteError, check_arrays
from qflare.tensors.encodings import Encoding, encode, wire_manifest
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import TrainingFunctionError, UnsupportedTaskError
from qflare_client.keystore.identity import Identity
from qflare_client.keystore.store import KeyStore
from qflare_client.models.download import GlobalModel
from qflare_client.models.error_feedback import ErrorFeedback, corrected, selectable, subtract_sent
from qflare_client.models.upload import Payload
from qflare_client.rpc.caller import Calls
from qflare_client.tasks import Task

_DEFAULT_TOP_K_FRACTION = 0.1
"""Default top-k fraction of a training session, as stated in the contract."""


@dataclass(frozen=True)
class Contribution:
    """Result of training from a version."""

    base: GlobalModel
    """Base version."""

    arrays: Mapping[str, Array]
    """The trained tensors, with the names and shapes of the base version."""

    example_count: int
    """Number of local examples, 1 or more."""

    metrics: Mapping[str, float]
    """Metrics by name, finite."""


def feedback_for(store: KeyStore, calls: Calls) -> ErrorFeedback:
    """Return the error feedback of a device."""

    def is_accepted(update_id: str) -> bool:
        request = messages.GetUploadRequest(update_id=update_id)
        return calls.unary(calls.transport.stub.GetUpload, request).HasField("receipt")

    return ErrorFeedback(store, is_accepted)


def is_sparse(transfer: training_pb2.TransferPolicy) -> bool:
    """Return whether updates are top-k deltas."""
    return (
        _kind(transfer) == training_pb2.UPDATE_KIND_DELTA and _encoding(transfer) is Encoding.TOP_K
    )


def make_payload(contribution: Contribution, transfer: training_pb2.TransferPolicy) -> Payload:
    """Encode the payload as the training session requires.

    Raises:
        TrainingFunctionError: The arrays do not match the base version, or are not finite.
        UnsupportedTaskError: The session requires an encoding that this SDK does not support.
    """
    return make_payload_with_residual(contribution, transfer, {})[0]


def make_payload_with_residual(
    contribution: Contribution, transfer: training_pb2.TransferPolicy, residual: Mapping[str, Array]
) -> tuple[Payload, dict[str, Array]]:
    """Encode the payload as the training session requires, and return the residual of a top-k delta.

    Args:
        contribution: Result of training.
        transfer: Transfer settings of the training session.
        residual: Residual of earlier top-k updates, which is added to a top-k delta; empty for none.

    Returns:
        The payload and the next residual, which is empty unless the update is a top-k delta.

    Raises:
        TrainingFunctionError: The arrays do not match the base version, or are not finite.
        UnsupportedTaskError: The session requires an encoding that this SDK does not support.
    """
    manifest = contribution.base.manifest
    arrays = _fitted(contribution.arrays, manifest)
    if _kind(transfer) == training_pb2.UPDATE_KIND_DELTA:
        arrays = _difference(arrays, contribution.base.arrays)
    encoding = _encoding(transfer)
    if encoding is Encoding.FULL_PRECISION:
        return Payload(manifest, arrays), {}
    wide: dict[str, Array] = {}
    if is_sparse(transfer):
        wide = corrected(arrays, residual, manifest)
        arrays = selectable(wide, arrays, manifest)
    fraction = transfer.top_k_fraction or _DEFAULT_TOP_K_FRACTION
    try:
        encoded = encode(arrays, manifest, encoding, fraction)
    except NonFiniteError as error:
        raise TrainingFunctionError(f"trained arrays: {error}") from error
    subtract_sent(wide, encoded)
    return Payload(wire_manifest(manifest, encoding, fraction), encoded), wide


def _kind(transfer: training_pb2.TransferPolicy) -> training_pb2.UpdateKind.ValueType:
    if transfer.update_kind == training_pb2.UPDATE_KIND_DELTA:
        return training_pb2.UPDATE_KIND_DELTA
    return training_pb2.UPDATE_KIND_WEIGHTS


def _encoding(transfer: training_pb2.TransferPolicy) -> Encoding:
    try:
        return Encoding.from_number(transfer.update_encoding)
    except InvalidManifestError as error:
        raise UnsupportedTaskError(str(error)) from error


def make_statement(
    task: Task, contribution: Contribution, payload: Payload, *, realm: str, device_id: str
) -> security_pb2.UpdateStatement:
    """Return the statement of an update, without the signing key.

    Raises:
        TrainingFunctionError: The example count or a metric cannot be sent.
    """
    check_counts(contribution)
    now = Timestamp()
    now.GetCurrentTime()
    return security_pb2.UpdateStatement(
        realm=realm,
        training_session_id=task.training_session_id,
        round_number=task.round_number,
        task_nonce=task.nonce,
        update_id=new_update_id(),
        device_id=device_id,
        base_version=task.base_version,
        base_digest=task.base_digest,
        layout_digest=payload.manifest.layout_digest,
        size_bytes=payload.manifest.size_bytes,
        payload_digest=payload.digest,
        wire_digest=payload.digest,
        kind=_kind(task.transfer),
        encoding=training_pb2.Encoding.ValueType(_encoding(task.transfer)),
        base_encoding=training_pb2.Encoding.ValueType(contribution.base.encoding),
        example_count=contribution.example_count,
        metrics={name: float(value) for name, value in contribution.metrics.items()},
        create_time=now,
    )


def sign_statement(
    key: SigningKey, statement: security_pb2.UpdateStatement
) -> security_pb2.SignedEnvelope:
    """Sign the statement of an update.

    Raises:
        TrainingFunctionError: There are too many metrics, or a metric name is too long.
    """
    statement.key_id = key.public.key_id
    try:
        return sign_update(key, statement)
    except StatementError as error:
        raise TrainingFunctionError(f"update: {error}") from error


def make_evaluation(
    identity: Identity, task: Task, example_count: int, metrics: Mapping[str, float]
) -> messages.ReportEvaluationRequest:
    """Return the signed evaluation report of the version that a task names.

    Raises:
        TrainingFunctionError: The example count or a metric cannot be sent.
    """
    check_example_count(example_count)
    check_metrics(metrics)
    now = Timestamp()
    now.GetCurrentTime()
    statement = security_pb2.EvaluationStatement(
        realm=identity.realm,
        training_session_id=task.training_session_id,
        version=task.base_version,
        version_digest=task.base_digest,
        evaluation_nonce=task.nonce,
        device_id=identity.device_id,
        key_id=identity.keys.signing.public.key_id,
        example_count=example_count,
        metrics={name: float(value) for name, value in metrics.items()},
        create_time=now,
    )
    try:
        signed = sign_evaluation(identity.keys.signing, statement)
    except StatementError as error:
        raise TrainingFunctionError(f"evaluation: {error}") from error
    return messages.ReportEvaluationRequest(statement=signed)


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Check that metrics can be sent.

    Raises:
        TrainingFunctionError: A value is not a finite number.
    """
    for name, value in metrics.items():
        try:
            finite = math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            raise TrainingFunctionError(f"metric {name!r}: got {value!r}, want a finite number")


def check_example_count(example_count: object) -> None:
    """Check that an example count can be sent.

    Raises:
        TrainingFunctionError: It is not a positive integer.
    """
    if not isinstance(example_count, int | np.integer) or example_count < 1:
        raise TrainingFunctionError(f"example count: got {example_count!r}, want an integer >= 1")


def check_counts(contribution: Contribution) -> None:
    """Check that the example count and the metrics of a contribution can be sent.

    Raises:
        TrainingFunctionError: They cannot.
    """
    check_example_count(contribution.example_count)
    check_metrics(contribution.metrics)


def _fitted(arrays: Mapping[str, Array], manifest: Manifest) -> Mapping[str, Array]:
    """Cast arrays to the dtypes of the manifest, because numpy often promotes float32 to float64."""
    dtypes = {spec.name: spec.dtype.numpy for spec in manifest.tensors}
    try:
        fitted = {
            name: np.asarray(array).astype(
                dtypes.get(name, np.asarray(array).dtype), casting="same_kind", copy=False
            )
            for name, array in arrays.items()
        }
        check_arrays(fitted, manifest)
    except (TypeError, ValueError, InvalidManifestError) as error:
        raise TrainingFunctionError(f"trained arrays: {error}") from error
    return fitted


def _difference(arrays: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Array]:
    """Subtract the base version from floating-point tensors; the others are sent unchanged."""
    return {
        name: array - base[name] if _is_floating(array) else array for name, array in arrays.items()
    }


def _is_floating(array: Array) -> bool:
    # numpy reports kind "V" for bfloat16.
    return array.dtype.kind not in "iub"
