"""Rules of secure aggregation in a training session: settings, the masking in tasks, the layout of updates.

`complete_masking` fills in the settings' defaults and refuses what contradicts sums of masked updates: everything that
reads single updates, and everything that would carry a number of a single device in the clear.
"""

from typing import Final

from google.protobuf.duration_pb2 import Duration

from qflare.evidence.statements import StatementError
from qflare.evidence.unmasking import MAX_HELPER_COUNT, MIN_COHORT, open_helper
from qflare.masking.graph_parameters import (
    COMPLETE_UP_TO,
    MIN_GROUP,
    InfeasibleGroupError,
    practical_parameters,
)
from qflare.masking.noise import HELPER, IN_SUM, fits
from qflare.masking.parameters import (
    DEFAULT_BITS,
    InvalidMaskingError,
    MaskingParameters,
)
from qflare.masking.staleness import MAX_STALENESS, usual_weights
from qflare.tensors import Manifest
from qflare.tensors.encodings import Encoding, wire_manifest
from qflare.tensors.vectors import float_count
from qflare.v1 import security_pb2, training_pb2
from qflare_server.context import Context
from qflare_server.errors import HelperUnavailableError, InvalidRequestError
from qflare_server.training.rhythm import ASYNCHRONOUS, is_asynchronous

MEANS: Final = frozenset(
    {"fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", *ASYNCHRONOUS}
)
"""Strategies whose aggregate is a mean of the updates by their weights, which a sum gives."""

COMPARISONS: Final = frozenset(
    {"median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "bulyan"}
)
"""Strategies that compare updates, which under secure aggregation are the means of groups."""

DEFAULT_CORRUPT: Final = 0.2
DEFAULT_DROPOUT: Final = 0.1
DEFAULT_STEP_S: Final = 60

_RETRY: Final = training_pb2.MISSED_QUORUM_ACTION_RETRY
_ROOM_BYTES: Final = 16_384
"""Of a task statement's 65,536 bytes, those left to everything but settings of devices and documents of helpers."""


def is_masked(config: training_pb2.TrainingConfig) -> bool:
    """Return whether a training session has secure aggregation."""
    return bool(config.secure_aggregation.mode)


def compares_groups(config: training_pb2.TrainingConfig) -> bool:
    """Return whether the strategy compares the means of groups with neighbors."""
    return bool(group_quorum(config)) and config.strategy.name in COMPARISONS


def group_quorum(config: training_pb2.TrainingConfig) -> int:
    """Return the fewest groups of a round with a quorum; 0 where there is one sum alone."""
    policy = config.secure_aggregation
    if policy.mode != training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS or not policy.group_size:
        return 0
    return int(config.rounds.quorum // policy.group_size)


def has_noise_in_sum(config: training_pb2.TrainingConfig) -> bool:
    """Return whether devices or helpers add the noise of differential privacy, and the coordinator none."""
    return config.secure_aggregation.noise in IN_SUM


def max_weight(config: training_pb2.TrainingConfig) -> int:
    """Return the largest weight of a masked update."""
    return 1 if _is_uniform(config) else int(config.safeguards.max_example_count)


def _is_uniform(config: training_pb2.TrainingConfig) -> bool:
    """Return whether every update counts as one, as always under central privacy and in asynchronous rounds."""
    is_private = bool(config.privacy.noise_multiplier)
    return config.strategy.uniform_weights or is_private or is_asynchronous(config)


def parameters_of(config: training_pb2.TrainingConfig) -> MaskingParameters:
    """Return the masking parameters of a complete configuration with secure aggregation."""
    return MaskingParameters.of(
        config.secure_aggregation, max_weight(config), config.privacy.noise_multiplier
    )


def require_room(config: training_pb2.TrainingConfig, manifest: Manifest) -> str | None:
    """Return why a model has too many elements for the noise of devices or helpers; None if it has not."""
    if not has_noise_in_sum(config):
        return None
    count, levels = float_count(manifest), parameters_of(config).clip_levels
    if fits(levels, count):
        return None
    return (
        f"{count} elements: with secure_aggregation.bits {config.secure_aggregation.bits} the clipped change has "
        f"{levels:.4g} levels of quantization, want at least {2 * count**0.5:.4g}, twice the square root of the number "
        "of elements, so that the sum with its noise fits into the ring: want more bits or a smaller max_cohort"
    )


def update_manifest(config: training_pb2.TrainingConfig, manifest: Manifest) -> Manifest:
    """Return the layout of an update of a model on the wire."""
    if is_masked(config):
        return parameters_of(config).manifest(manifest)
    encoding = Encoding.from_number(config.transfer.update_encoding)
    return wire_manifest(manifest, encoding, config.transfer.top_k_fraction or 1.0)


def complete_masking(config: training_pb2.TrainingConfig) -> None:
    """Fill in the defaults of secure aggregation in a configuration that is complete otherwise.

    Raises:
        InvalidRequestError: A setting is out of range, or contradicts another one.
    """
    policy = config.secure_aggregation
    if not policy.mode:
        if policy != training_pb2.SecureAggregationPolicy():
            raise _refusal(
                "mode", "got none with other settings, want SECURE_AGGREGATION_MODE_HELPER"
            )
        if config.transfer.update_encoding == training_pb2.ENCODING_MASKED:
            raise _refused(
                "transfer.update_encoding", "masked updates need secure_aggregation.mode"
            )
        return
    policy.bits = policy.bits or DEFAULT_BITS
    policy.max_cohort = policy.max_cohort or config.rounds.target
    policy.min_cohort = policy.min_cohort or config.rounds.quorum
    _complete_staleness(config)
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        _complete_neighbors(config)
    if config.privacy.noise_multiplier:
        _complete_privacy(config)
    _check_noise(config)
    _check_cohort(config)
    _check_contradictions(config)
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_HELPER:
        _check_names(policy)
    try:
        parameters_of(config)
    except InvalidMaskingError as error:
        raise InvalidRequestError(
            f"secure_aggregation.{error}", field=f"config.secure_aggregation.{error.field}"
        ) from error
    config.transfer.update_kind = training_pb2.UPDATE_KIND_DELTA
    config.transfer.update_encoding = training_pb2.ENCODING_MASKED


def _complete_neighbors(config: training_pb2.TrainingConfig) -> None:
    """Fill in the settings of groups, and refuse those with which no group could be opened."""
    policy, rounds = config.secure_aggregation, config.rounds
    policy.corrupt_fraction = policy.corrupt_fraction or DEFAULT_CORRUPT
    policy.dropout_fraction = policy.dropout_fraction or DEFAULT_DROPOUT
    if not policy.HasField("step_timeout"):
        policy.step_timeout.CopyFrom(Duration(seconds=DEFAULT_STEP_S))
    if policy.helpers:
        raise _refusal("helpers", "with neighbors there is no helper")
    rounds.missed_quorum_action = rounds.missed_quorum_action or _RETRY
    if rounds.missed_quorum_action == training_pb2.MISSED_QUORUM_ACTION_EXTEND:
        raise _refused(
            "rounds.missed_quorum_action",
            "a round whose groups are formed gets no more devices when it is extended; want MISSED_QUORUM_ACTION_RETRY "
            "or MISSED_QUORUM_ACTION_FAIL",
        )
    size, least = policy.group_size or rounds.target, max(policy.min_cohort, MIN_GROUP)
    if not least <= size <= rounds.target:
        raise _refusal(
            "group_size",
            f"got groups of {size}, want {least}, the larger of min_cohort and {MIN_GROUP}, to rounds.target "
            f"{rounds.target}",
        )
    smallest = min(size, max(rounds.quorum, MIN_GROUP))
    largest = min(rounds.target, 2 * policy.group_size - 1 if policy.group_size else rounds.target)
    above = range(max(smallest, COMPLETE_UP_TO), largest, max(1, (largest - smallest) // 8))
    for members in {*range(smallest, min(largest, COMPLETE_UP_TO) + 1), *above, size, largest}:
        # Above these, a complete graph withstands all fractions that are allowed; the number of neighbors grows slowly.
        try:
            practical_parameters(members, policy.corrupt_fraction, policy.dropout_fraction)
        except InfeasibleGroupError as error:
            raise _refusal("group_size", f"{error}; groups have {smallest} to {largest}") from error


def _complete_staleness(config: training_pb2.TrainingConfig) -> None:
    """Fill in the weights of stale updates, and refuse tables that are of no use."""
    policy, most = config.secure_aggregation, config.rounds.max_staleness
    if not is_asynchronous(config):
        if policy.staleness_weights:
            raise _refusal("staleness_weights", "only asynchronous rounds take stale updates")
        return
    if policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        raise _refused(
            "strategy.name",
            f"{config.strategy.name[:100]} takes updates of several rounds into one sum, and with neighbors masks "
            "cancel only within the round for which groups were formed; use a helper",
        )
    if most > MAX_STALENESS:
        raise _refused(
            "rounds.max_staleness",
            f"got {most}, want at most {MAX_STALENESS} with secure aggregation",
        )
    if not policy.staleness_weights:
        policy.staleness_weights.extend(usual_weights(most))
    if len(policy.staleness_weights) != most + 1:
        raise _refusal(
            "staleness_weights",
            f"got {len(policy.staleness_weights)}, want {most + 1}, for a staleness of 0 to rounds.max_staleness",
        )


def _complete_privacy(config: training_pb2.TrainingConfig) -> None:
    """Let devices clip to the norm that the noise is calibrated for, and refuse what no noise covers."""
    policy, privacy = config.secure_aggregation, config.privacy
    policy.clip = policy.clip or privacy.clip_norm
    if policy.clip != privacy.clip_norm:
        raise _refusal(
            "clip",
            f"got {policy.clip:g}, want privacy.clip_norm {privacy.clip_norm:g} or none: devices clip to the norm that "
            "the noise is calibrated for",
        )
    if privacy.target_quantile:
        raise _refused(
            "privacy.target_quantile",
            "an adaptive clipping norm follows the norms of single updates, which secure aggregation hides",
        )
    if policy.metrics:
        raise _refusal(
            "metrics",
            "with differential privacy none can be sent: the noise covers only the weights",
        )


def _check_noise(config: training_pb2.TrainingConfig) -> None:
    """Refuse a source of noise that is unknown, or that has no noise or no helper to add it."""
    policy, privacy = config.secure_aggregation, config.privacy
    if policy.noise not in training_pb2.NoiseSource.values():
        raise _refusal("noise", f"got number {policy.noise}, want a NOISE_SOURCE")
    if policy.noise and not privacy.noise_multiplier:
        raise _refusal("noise", "without privacy.noise_multiplier there is no noise")
    if not has_noise_in_sum(config):
        return
    if policy.noise == HELPER and policy.mode == training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        raise _refusal("noise", "with neighbors there is no helper; want NOISE_SOURCE_DEVICES")
    if privacy.accountant == training_pb2.PRIVACY_ACCOUNTANT_PLD:
        raise _refused(
            "privacy.accountant",
            "the noise of devices and helpers is discrete; its published bounds are of concentrated differential "
            "privacy, which PRIVACY_ACCOUNTANT_RDP computes with",
        )


def _check_cohort(config: training_pb2.TrainingConfig) -> None:
    policy, rounds = config.secure_aggregation, config.rounds
    if not MIN_COHORT <= policy.min_cohort <= rounds.quorum:
        raise _refusal(
            "min_cohort",
            f"got {policy.min_cohort}, want {MIN_COHORT} to rounds.quorum {rounds.quorum}: the sum of fewer tells too "
            "much of each, and a round with a quorum must make a version",
        )
    if policy.max_cohort < rounds.target:
        raise _refusal(
            "max_cohort",
            f"got {policy.max_cohort}, want at least rounds.target {rounds.target}: a larger sum would wrap",
        )


def _check_contradictions(config: training_pb2.TrainingConfig) -> None:
    """Refuse settings that read single updates, or that masked updates cannot have."""
    transfer, safeguards = config.transfer, config.safeguards
    _check_strategy(config)
    if transfer.update_encoding not in (training_pb2.ENCODING_NONE, training_pb2.ENCODING_MASKED):
        raise _refused(
            "transfer.update_encoding",
            "masked updates have an encoding of their own, set by secure_aggregation.bits; elements that devices "
            "select or scale differently cannot be summed under masks",
        )
    if safeguards.quarantine_rejections:
        raise _refused(
            "safeguards.quarantine_rejections",
            "counts updates that safeguards reject, which secure aggregation hides",
        )
    if not _is_uniform(config) and not safeguards.max_example_count:
        raise _refused(
            "safeguards.max_example_count",
            "empty; state the largest weight of an update, or set strategy.uniform_weights: the scale of masked "
            "updates depends on it",
        )


def _check_strategy(config: training_pb2.TrainingConfig) -> None:
    """Refuse strategies that need more than the sums of the updates that are opened."""
    name = config.strategy.name
    if name in MEANS or compares_groups(config):
        return
    if name not in COMPARISONS:
        raise _refused(
            "strategy.name",
            f"{name[:100]} looks at single updates, which secure aggregation hides; it gives only sums, enough for "
            f"{', '.join(sorted(MEANS))}",
        )
    raise _refused(
        "strategy.name",
        f"{name} looks at single updates, which secure aggregation hides; with neighbors it compares the means of "
        "groups instead: set secure_aggregation.group_size, not above rounds.quorum",
    )


def _check_names(policy: training_pb2.SecureAggregationPolicy) -> None:
    if not 1 <= len({*policy.helpers}) == len(policy.helpers) <= MAX_HELPER_COUNT:
        raise _refusal(
            "helpers",
            f"got {len(policy.helpers)}, want 1 to {MAX_HELPER_COUNT} different helper ids",
        )


def require_helpers(context: Context, config: training_pb2.TrainingConfig) -> None:
    """Check that this coordinator knows the helpers of a new training session.

    Raises:
        InvalidRequestError: It does not know one.
    """
    if not is_masked(config):
        return
    known = {} if context.helpers is None else context.helpers.documents()
    for helper_id in config.secure_aggregation.helpers:
        if helper_id not in known:
            raise _refusal(
                "helpers",
                f"helper {helper_id[:64]} is unknown here; put its bundle into the folder that QFLARE_HELPER_DIR names",
            )
    parameters, labels = config.device_training.parameters, config.device_training.labels
    settings = training_pb2.DeviceTraining(parameters=parameters, labels=labels).ByteSize()
    documents = sum(known[name].ByteSize() for name in config.secure_aggregation.helpers)
    if settings + documents > 65_536 - _ROOM_BYTES:
        raise _refusal(
            "helpers",
            f"documents of the helpers and device_training take {settings + documents} bytes, want at most "
            f"{65_536 - _ROOM_BYTES}: a signed task holds both",
        )


def masking_task(
    context: Context, config: training_pb2.TrainingConfig
) -> security_pb2.MaskingTask | None:
    """Return the masking of a round's task; None without secure aggregation.

    Raises:
        HelperUnavailableError: The bundle of a helper is missing or not usable.
    """
    if not is_masked(config):
        return None
    known = {} if context.helpers is None else context.helpers.documents()
    policy = config.secure_aggregation
    documents = []
    for helper_id in policy.helpers:
        if helper_id not in known:
            raise HelperUnavailableError(f"no bundle of helper {helper_id} in QFLARE_HELPER_DIR")
        try:
            helper = open_helper(known[helper_id], context.config.realm)
        except StatementError as error:
            raise HelperUnavailableError(f"bundle of helper {helper_id}: {error}") from error
        assert helper.helper_id == helper_id
        documents.append(known[helper_id])
    # 0 where devices need to know staleness weights: an SDK that does not would scale its change too large.
    largest = 0 if policy.staleness_weights else max_weight(config)
    task = security_pb2.MaskingTask(max_weight=largest, helpers=documents)
    if has_noise_in_sum(config):
        task.noisy.policy.CopyFrom(policy)
        task.noisy.noise_multiplier = config.privacy.noise_multiplier
    else:
        task.policy.CopyFrom(policy)
    return task


def _refusal(name: str, reason: str) -> InvalidRequestError:
    return _refused(f"secure_aggregation.{name}", reason)


def _refused(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: {reason}", field=f"config.{name}")
