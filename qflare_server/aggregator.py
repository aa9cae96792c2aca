"""Aggregation functions for programs that embed the coordinator.

Module-level functions on the coordinator's database and use cases (`serving.embedded` documents the database and how it
is opened). Weights are raw little-endian float32, of one length for all devices; the average is weighted by
`metadata["samples_count"]`. They use a regular training session `in-process-N`: durable, audited, with signed versions,
and visible over gRPC. It is never assigned to enrolled devices, and only `aggregate_models` closes its rounds.

A refusal returns False or None and logs its reason as a WARNING; every other failure raises.

    store_model_update("ward-3", weights.astype("<f4").tobytes(), {"samples_count": 120})
    average = aggregate_models(min_updates=2)
"""

import logging
import math
from collections.abc import Mapping
from typing import Any, Final

from qflare_server.errors import InvalidRequestError, RoundNotOpenError
from qflare_server.serving.embedded import (
    CALLER,
    EmbeddedCoordinator,
    ForkedError,
    close,
    configure,
    current,
    refused,
)
from qflare_server.storage.records import GlobalModel, ModelUpdate
from qflare_server.storage.tables import RoundState
from qflare_server.use_cases.in_process.training import Contribution
from qflare_server.use_cases.training_sessions.progress import Progress

__all__ = [
    "ForkedError",
    "aggregate_models",
    "clear_pending_updates",
    "close",
    "configure",
    "get_aggregation_metrics",
    "get_aggregation_status",
    "get_global_model",
    "get_model_updates_for_device",
    "reset_aggregation_state",
    "store_model_update",
    "validate_model_update",
]

logger = logging.getLogger(__name__)

READY_COUNT: Final = 2
MAX_LIMIT: Final = 1000
METRICS: Final = {
    "loss": "loss",
    "local_loss": "loss",
    "accuracy": "accuracy",
    "local_accuracy": "accuracy",
    "epochs": "epochs",
    "local_epochs": "epochs",
    "training_time": "training_time_s",
    "training_time_s": "training_time_s",
}
"""Metadata entries that are metrics, with their names in the coordinator."""

Weights = bytes | bytearray | memoryview


def store_model_update(
    device_id: str, model_weights: Weights, metadata: Mapping[str, Any] | None = None
) -> bool:
    """Store a device's weights for the open round, durably.

    Returns False if the device is unknown or not active or has contributed to this round already, or if the weights
    are not finite or differ in length from the first ones.

    Args:
        device_id: Id of a registered device.
        model_weights: Little-endian float32.
        metadata: `samples_count` (a whole number from 1, the weight; 1 if absent), `loss`, `accuracy`, `epochs`
            and `training_time` in seconds (also as `local_...`); other entries are ignored.
    """
    with refused(logger, "store_model_update") as refusal:
        contribution = _contribution(device_id, model_weights, metadata)
        embedded = current()
        try:
            embedded.in_process.contribute(CALLER, contribution)
        except RoundNotOpenError:
            # Publish a round closed before a crash; extend one past its deadline.
            _bring_forward(embedded)
            embedded.in_process.contribute(CALLER, contribution)
    return not refusal


def aggregate_models(min_updates: int = 2) -> bytes | None:
    """Close the open round and return the weighted average of its updates.

    Returns None if fewer than `min_updates` (at least one) are pending, or if none of them is usable.

    Raises:
        RuntimeError: The round is closed but could not be published; the log has the reason. The next call retries.
    """
    embedded = current()
    number = embedded.in_process.close_round(min_updates)
    if number is None:
        return None
    _bring_forward(embedded)
    closed = embedded.in_process.find_round(number)
    if closed is None or closed.state in {RoundState.FAILED.value, RoundState.CANCELLED.value}:
        logger.warning("aggregate_models: round %d made no version", number)
        return None
    if closed.version is None:
        raise RuntimeError(f"round {number} was closed but not published")
    return _read(embedded, closed.training_session_id, closed.version)


def get_aggregation_status() -> dict[str, Any]:
    """Return `pending_updates`, `last_aggregation` (ISO 8601 or None), `current_round`, `ready_for_aggregation`.

    `current_round` counts the aggregations, 0 before the first; ready means two pending updates or more.
    """
    progress = current().in_process.progress()
    latest = _latest(progress)
    pending = _pending_count(progress)
    return {
        "pending_updates": pending,
        "last_aggregation": None if latest is None else latest.created_at.isoformat(),
        "current_round": 0 if latest is None else latest.version,
        "ready_for_aggregation": pending >= READY_COUNT,
    }


def get_global_model() -> bytes | None:
    """Return the latest average, None before the first aggregation."""
    embedded = current()
    latest = _latest(embedded.in_process.progress())
    if latest is None:
        return None
    return _read(embedded, latest.training_session_id, latest.version)


def get_aggregation_metrics() -> dict[str, Any]:
    """Return aggregation statistics; those of the latest aggregation are None before the first.

    `total_rounds`, `pending_updates`, `last_aggregation_time` (ISO 8601), `model_accuracy` and `model_loss` (means
    weighted by samples), `participants_last_round`.
    """
    progress = current().in_process.progress()
    latest = _latest(progress)
    return {
        "total_rounds": 0 if latest is None else latest.version,
        "pending_updates": _pending_count(progress),
        "last_aggregation_time": None if latest is None else latest.created_at.isoformat(),
        "model_accuracy": None if latest is None else latest.accuracy,
        "model_loss": None if latest is None else latest.loss,
        "participants_last_round": 0 if latest is None else latest.participant_count,
    }


def get_model_updates_for_device(device_id: str, limit: int = 100) -> list[dict[str, Any]]:
    """Return a device's contributions, newest first, without the weights.

    Args:
        device_id: Id of any device.
        limit: Maximum number of contributions, 1 to 1,000.

    Raises:
        ValueError: The limit is out of range.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit: got {limit}, want 1 to {MAX_LIMIT}")
    return [_shown(update) for update in current().in_process.contributions(device_id, limit)]


def validate_model_update(
    device_id: str, model_weights: Weights, metadata: Mapping[str, Any] | None = None
) -> bool:
    """Return whether `store_model_update` would accept this; stores nothing."""
    with refused(logger, "validate_model_update") as refusal:
        current().in_process.check(_contribution(device_id, model_weights, metadata))
    return not refusal


def clear_pending_updates() -> bool:
    """Reject the pending updates, so that their devices may contribute again; return False if refused."""
    with refused(logger, "clear_pending_updates") as refusal:
        current().in_process.discard_round(CALLER)
    return not refusal


def reset_aggregation_state() -> bool:
    """Reset to no pending updates, no global model and any vector length. Earlier data stays in the database."""
    with refused(logger, "reset_aggregation_state") as refusal:
        current().in_process.end(CALLER)
    return not refusal


def _bring_forward(embedded: EmbeddedCoordinator) -> None:
    progress = embedded.in_process.progress()
    if progress is not None:
        embedded.publish(progress.session.id)


def _contribution(
    device_id: str, weights: Weights, metadata: Mapping[str, Any] | None
) -> Contribution:
    facts = metadata or {}
    samples = facts.get("samples_count", 1)
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise InvalidRequestError("samples_count: not a whole number", field="samples_count")
    metrics = {
        METRICS[name]: _number(name, value)
        for name, value in facts.items()
        if name in METRICS and value is not None
    }
    return Contribution(device_id, weights, samples, metrics)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name}: not a number", field=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequestError(f"{name}: not finite", field=name)
    return number


def _latest(progress: Progress | None) -> GlobalModel | None:
    """Return the latest version that is an average, None if there is only the initial model."""
    if progress is None or progress.latest is None or progress.latest.version == 0:
        return None
    return progress.latest


def _pending_count(progress: Progress | None) -> int:
    return 0 if progress is None else progress.pending_count


def _read(embedded: EmbeddedCoordinator, training_session_id: str, version: int) -> bytes:
    delivery = embedded.deliveries.find(training_session_id, version)
    return b"".join(chunk for _, chunk in embedded.deliveries.chunks(delivery, 0))


def _shown(update: ModelUpdate) -> dict[str, Any]:
    aggregated = update.aggregated_at
    return {
        "id": update.id,
        "device_id": update.device_id,
        "round_number": update.round_number,
        "status": update.state,
        "model_hash": update.payload_digest,
        "samples_count": update.example_count,
        "local_loss": update.loss,
        "local_accuracy": update.accuracy,
        "local_epochs": update.local_epochs,
        "training_time": update.training_time_s,
        "created_at": update.accepted_at.isoformat(),
        "aggregated_at": None if aggregated is None else aggregated.isoformat(),
    }
