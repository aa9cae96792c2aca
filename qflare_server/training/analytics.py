"""Rules of federated analytics: a query is a training session of one round whose model is a vector of zeros.

Devices answer with a change of that vector, which every rule of rounds, secure aggregation, privacy, publication and
evidence covers as it covers an update: the version of the round is the signed noisy mean of the answers.
"""

from typing import Final

from qflare.analytics.queries import CLIP_NORM, InvalidQueryError, Query
from qflare.masking.noise import IN_SUM
from qflare.tensors import Manifest
from qflare.v1 import security_pb2, training_pb2
from qflare_server.errors import InvalidManifestError, InvalidRequestError
from qflare_server.strategies.accounting import PrivacyLedger, require_library, spent
from qflare_server.strategies.errors import StrategyConfigError

DEFAULT_DELTA: Final = 1e-6
_LEAST_NOISE: Final = 1e-2
_MOST_NOISE: Final = 1e6
_STEPS: Final = 60


def is_query(config: training_pb2.TrainingConfig) -> bool:
    """Return whether a training session is a query."""
    return config.HasField("analytics")


def query_of(config: training_pb2.TrainingConfig) -> Query | None:
    """Return the query of a complete configuration; None if it trains a model."""
    return Query.from_proto(config.analytics) if is_query(config) else None


def query_task(config: training_pb2.TrainingConfig) -> security_pb2.AnalyticsTask | None:
    """Return what a signed task says about the query; None if it trains a model."""
    if not is_query(config):
        return None
    return security_pb2.AnalyticsTask(
        query=config.analytics,
        epsilon=config.privacy.epsilon_budget,
        delta=config.privacy.delta,
        min_cohort=config.rounds.quorum,
    )


def complete_query(config: training_pb2.TrainingConfig) -> None:
    """Check a query and fill in its defaults, before those of a training session; no effect without a query.

    The noise is the smallest that keeps the result within `privacy.epsilon_budget`.

    Raises:
        InvalidRequestError: A setting is out of range, or has no meaning in a query.
    """
    if not is_query(config):
        return
    try:
        query = Query.from_proto(config.analytics)
    except InvalidQueryError as error:
        raise InvalidRequestError(
            f"analytics.{error}", field=f"config.analytics.{error.field}"
        ) from error
    config.analytics.CopyFrom(query.to_proto())
    _check_idle(config)
    is_masked = bool(config.secure_aggregation.mode)
    if is_masked == query.is_unmasked:
        raise _refused(
            "analytics.unmasked",
            "set together with secure_aggregation, which hides single answers"
            if is_masked
            else "without secure_aggregation the coordinator reads single answers: set secure_aggregation, or unmasked",
        )
    if config.secure_aggregation.noise in IN_SUM:
        raise _refused(
            "secure_aggregation.noise",
            "results of queries state the deviation of noise that the coordinator adds; want "
            "NOISE_SOURCE_COORDINATOR or none",
        )
    config.total_rounds = 1
    config.strategy.uniform_weights = True
    _complete_noise(config.privacy)


def _complete_noise(privacy: training_pb2.PrivacyPolicy) -> None:
    if not 0 < privacy.epsilon_budget < float("inf"):
        raise _refused("privacy.epsilon_budget", "empty; want the epsilon of the result, above 0")
    privacy.delta = privacy.delta or DEFAULT_DELTA
    if not 0 < privacy.delta < 1:
        raise _refused("privacy.delta", f"got {privacy.delta:g}, want above 0 and below 1")
    privacy.clip_norm = privacy.clip_norm or CLIP_NORM
    if privacy.clip_norm != CLIP_NORM:
        raise _refused(
            "privacy.clip_norm", f"got {privacy.clip_norm:g}, want {CLIP_NORM:g}, that of answers"
        )
    if privacy.target_quantile:
        raise _refused("privacy.target_quantile", "the norm of answers is bounded beforehand")
    if not privacy.noise_multiplier:
        privacy.noise_multiplier = smallest_noise(privacy.epsilon_budget, privacy.delta)


def smallest_noise(epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier of one release by the accountant of Renyi orders, to six digits.

    Args:
        epsilon: Above 0.
        delta: Within (0, 1).

    Raises:
        InvalidRequestError: The accountant is not installed, or no noise is enough.
    """
    try:
        require_library()
    except StrategyConfigError as error:
        raise _refused("privacy", str(error)) from error

    def is_enough(noise: float) -> bool:
        return spent(PrivacyLedger().with_release(noise, 1.0), delta).epsilon <= epsilon

    low, high = _LEAST_NOISE, _MOST_NOISE
    if not is_enough(high):
        raise _refused("privacy.epsilon_budget", f"got {epsilon:g}, for which no noise is enough")
    if is_enough(low):
        return low
    for _ in range(_STEPS):
        if high - low <= 1e-6 * low:
            break
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _check_idle(config: training_pb2.TrainingConfig) -> None:
    """Refuse settings of training sessions that a query has no use for, or that would change its result."""
    transfer, safeguards, strategy = config.transfer, config.safeguards, config.strategy
    set_fields = {
        "total_rounds": config.total_rounds > 1,
        "strategy.name": strategy.name not in {"", "fedavg"},
        "strategy.optimizer": bool(strategy.optimizer),
        "strategy.parameters": bool(strategy.parameters),
        "device_training": config.device_training != training_pb2.DeviceTraining(),
        "transfer.update_kind": transfer.update_kind == training_pb2.UPDATE_KIND_WEIGHTS,
        "transfer.update_encoding": transfer.update_encoding
        not in {
            training_pb2.ENCODING_UNSPECIFIED,
            training_pb2.ENCODING_NONE,
            training_pb2.ENCODING_MASKED,
        },
        "transfer.sealed": transfer.sealed,
        "transfer.download_encoding": transfer.download_encoding > training_pb2.ENCODING_NONE,
        "transfer.local_tensors": bool(transfer.local_tensors),
        "safeguards.clip_norm": bool(safeguards.clip_norm),
        "safeguards.max_norm": bool(safeguards.max_norm),
        "safeguards.min_cosine_similarity": safeguards.HasField("min_cosine_similarity"),
        "safeguards.max_example_count": bool(safeguards.max_example_count),
        "safeguards.quarantine_rejections": bool(safeguards.quarantine_rejections),
        "evaluation.every_rounds": bool(config.evaluation.every_rounds),
        "early_stop.metric": bool(config.early_stop.metric),
        "release.bounds": bool(config.release.bounds),
    }
    for name, is_set in set_fields.items():
        if is_set:
            raise _refused(name, "has no meaning in a query of federated analytics")
    transfer.update_kind = training_pb2.UPDATE_KIND_DELTA


def require_query_layout(config: training_pb2.TrainingConfig, manifest: Manifest) -> None:
    """Refuse an initial model of a query that is not the vector of its answers; no effect without a query.

    Raises:
        InvalidManifestError: It is another one.
    """
    query = query_of(config)
    if query is not None and manifest.layout_digest != query.manifest().layout_digest:
        raise InvalidManifestError(
            f"manifest: a query of kind {query.kind} wants one float32 tensor 'answer' of {query.element_count} "
            "elements",
            field="header.manifest",
        )


def _refused(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {reason}", field=f"config.{name}")
