"""Builds updates and evaluation reports: checks the arrays, encodes the payload, and signs the statement.

It does not retry or resume uploads (see `qflare_client.models.upload`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.signing import SigningKey
from qflare.evidence.statements import (
    StatementError,
    check_metrics,
    sign_evaluation,
    sign_update,
)
from qflare.ids import new_update_id
from qflare.protocol.constraints import find_field_violations
from qflare.tensors import Array, InvalidManifestError, InvalidPayloadError
from qflare.tensors.encodings import Encoding, encode, wire_manifest
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2, training_pb2
from qflare_client.arguments import instance, number, optional, positive, text, whole
from qflare_client.errors import (
    InvalidArgumentError,
    TrainingFunctionError,
    UnsupportedTaskError,
)
from qflare_client.keystore.identity import Identity
from qflare_client.models.download import GlobalModel
from qflare_client.models.error_feedback import corrected, selectable, subtract_sent
from qflare_client.models.fitting import fitted
from qflare_client.models.upload import Payload
from qflare_client.privacy import LocalPrivacy
from qflare_client.rpc.caller import Calls
from qflare_client.tasks import Task

MAX_EXAMPLE_COUNT: Final = 2**40
"""Most examples of an update or an evaluation."""

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

    local: Mapping[str, Array] = field(default_factory=dict)
    """The trained tensors that stay on the device."""


def acceptance_of(calls: Calls) -> Callable[[str], bool]:
    """Return a function that asks the coordinator whether it has accepted an update, given by its id."""

    def is_accepted(update_id: str) -> bool:
        request = messages.GetUploadRequest(update_id=update_id)
        return calls.unary(calls.transport.stub.GetUpload, request).HasField("receipt")

    return is_accepted


def is_sparse(transfer: training_pb2.TransferPolicy) -> bool:
    """Return whether updates are top-k deltas."""
    return (
        _kind(transfer) == training_pb2.UPDATE_KIND_DELTA and _encoding(transfer) is Encoding.TOP_K
    )


def needs_base(transfer: training_pb2.TransferPolicy) -> bool:
    """Return whether an update is made from the arrays of its base version as well as from the trained ones."""
    return _kind(transfer) == training_pb2.UPDATE_KIND_DELTA


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
    arrays: Mapping[str, Array] = fitted(contribution.arrays, manifest)
    is_delta = _kind(transfer) == training_pb2.UPDATE_KIND_DELTA
    encoding = _encoding(transfer)
    if encoding is Encoding.FULL_PRECISION:
        return Payload(manifest, arrays, contribution.base.arrays if is_delta else None), {}
    if is_delta:
        arrays = _difference(arrays, contribution.base.arrays)
    wide: dict[str, Array] = {}
    if is_sparse(transfer):
        wide = corrected(arrays, residual, manifest)
        arrays = selectable(wide, arrays, manifest)
    fraction = transfer.top_k_fraction or _DEFAULT_TOP_K_FRACTION
    try:
        encoded = encode(arrays, manifest, encoding, fraction)
    except InvalidPayloadError as error:
        raise TrainingFunctionError(f"trained arrays: {error}") from error
    subtract_sent(wide, encoded)
    return Payload(wire_manifest(manifest, encoding, fraction), encoded), wide


def _kind(transfer: training_pb2.TransferPolicy) -> training_pb2.UpdateKind.ValueType:
    """Return what an update holds, where an open kind means weights."""
    known = (training_pb2.UPDATE_KIND_WEIGHTS, training_pb2.UPDATE_KIND_DELTA)
    kind = transfer.update_kind or training_pb2.UPDATE_KIND_WEIGHTS
    if kind not in known:
        raise UnsupportedTaskError(
            f"update kind: got number {kind}, want one of {known}"
            "; if a later release made it, upgrade qflare"
        )
    return kind


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
        encoding=_wire_encoding(task),
        base_encoding=training_pb2.Encoding.ValueType(contribution.base.encoding),
        example_count=checked_example_count(contribution.example_count),
        metrics=checked_metrics(contribution.metrics),
        create_time=now,
    )


def _wire_encoding(task: Task) -> training_pb2.Encoding.ValueType:
    if task.masking is not None:
        return training_pb2.ENCODING_MASKED
    return training_pb2.Encoding.ValueType(_encoding(task.transfer))


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
    identity: Identity, task: Task, example_count: object, metrics: object
) -> messages.ReportEvaluationRequest:
    """Return the signed evaluation report of the version that a task names.

    Raises:
        TrainingFunctionError: The example count or a metric cannot be sent.
    """
    statement = make_evaluation_statement(
        task, example_count, metrics, realm=identity.realm, device_id=identity.device_id
    )
    statement.key_id = identity.keys.signing.public.key_id
    try:
        signed = sign_evaluation(identity.keys.signing, statement)
    except StatementError as error:
        raise TrainingFunctionError(f"evaluation: {error}") from error
    return messages.ReportEvaluationRequest(statement=signed)


def make_evaluation_statement(
    task: Task, example_count: object, metrics: object, *, realm: str, device_id: str
) -> security_pb2.EvaluationStatement:
    """Return the statement of an evaluation of the version that a task names, without the signing key.

    Raises:
        TrainingFunctionError: The example count or a metric cannot be sent.
    """
    now = Timestamp()
    now.GetCurrentTime()
    return security_pb2.EvaluationStatement(
        realm=realm,
        training_session_id=task.training_session_id,
        version=task.base_version,
        version_digest=task.base_digest,
        evaluation_nonce=task.nonce,
        device_id=device_id,
        example_count=checked_example_count(example_count),
        metrics=checked_metrics(metrics),
        create_time=now,
    )


def checked_metrics(metrics: object) -> dict[str, float]:
    """Return metrics as they are sent.

    Raises:
        TrainingFunctionError: They are no mapping of names to finite numbers.
    """
    if not isinstance(metrics, Mapping):
        got = type(metrics).__name__
        raise TrainingFunctionError(f"metrics: got {got}, want a mapping of names to numbers")
    try:
        converted = {
            text("metric name", name): _metric(name, value) for name, value in metrics.items()
        }
        check_metrics(converted)
    except (InvalidArgumentError, StatementError) as error:
        raise TrainingFunctionError(f"metrics: {error}") from error
    if converted:
        statement = security_pb2.UpdateStatement(metrics=converted)
        for violation in find_field_violations(statement, "metrics"):
            raise TrainingFunctionError(f"{violation.field}: {violation.description}")
    return converted


def _metric(name: str, value: object) -> float:
    # A comparison such as "loss < best" is a number to Python: as a metric it is 0 or 1.
    return number(f"metric {name!r}", int(value) if isinstance(value, bool | np.bool_) else value)


def checked_example_count(example_count: object) -> int:
    """Return an example count as it is sent.

    Raises:
        TrainingFunctionError: It is no integer, or not within 1 to 2^40.
    """
    try:
        return whole("example count", example_count, 1, MAX_EXAMPLE_COUNT)
    except InvalidArgumentError as error:
        raise TrainingFunctionError(str(error)) from error


def check_submission(task: object, base: object, privacy: object, timeout_s: object) -> None:
    """Check the arguments of a submission, except for the contribution.

    Raises:
        InvalidArgumentError: One is of another type, or out of range.
    """
    instance("task", task, Task)
    instance("base", base, GlobalModel)
    optional("privacy", privacy, LocalPrivacy)
    if timeout_s is not None:
        positive("timeout_s", timeout_s)


def checked(contribution: Contribution) -> Contribution:
    """Return a contribution as it can be sent: its arrays in the layout of the base version, plain numbers elsewhere.

    Raises:
        TrainingFunctionError: Arrays, example count or metrics cannot be sent.
    """
    return replace(
        contribution,
        arrays=fitted(contribution.arrays, contribution.base.manifest),
        example_count=checked_example_count(contribution.example_count),
        metrics=checked_metrics(contribution.metrics),
    )


def _difference(arrays: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Array]:
    """Subtract the base version from floating-point tensors; the others are sent unchanged.

    A difference beyond the range becomes infinite, which the checks of the payload find.
    """
    with np.errstate(all="ignore"):
        return {
            name: np.asarray(array - base[name]) if _is_floating(array) else array
            for name, array in arrays.items()
        }


def _is_floating(array: Array) -> bool:
    # numpy reports kind "V" for bfloat16.
    return array.dtype.kind not in "iub"
