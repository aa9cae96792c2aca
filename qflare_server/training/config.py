"""Training-session configuration: validated once, at creation, and stored as JSON.

`complete` fills in every default and rejects values that are out of range or contradictory. Readers of a stored
configuration therefore never interpret unset fields.
"""

import math
import secrets
import unicodedata
from typing import Final

from google.protobuf.duration_pb2 import Duration

from qflare.tensors import DType, Manifest
from qflare.tensors import InvalidManifestError as BadManifestError
from qflare.tensors.control_variates import CONTROL, LOCAL_PATTERN, missing_control
from qflare.tensors.download_encodings import DOWNLOAD_ENCODINGS
from qflare.tensors.encodings import Encoding
from qflare.tensors.local_tensors import is_local
from qflare.v1 import training_pb2
from qflare_server.errors import InvalidManifestError, InvalidRequestError
from qflare_server.training.analytics import complete_query, require_query_layout
from qflare_server.training.groups import checked_groups
from qflare_server.training.masking import complete_masking, require_room, update_manifest
from qflare_server.training.objective import DEFAULT_METRIC, resolved_goal
from qflare_server.training.reported_metrics import MAX_EXAMPLES, MAX_METRIC_NAME, is_reserved

DEFAULT_ROUNDS: Final = 10
DEFAULT_DEADLINE_S: Final = 600
MAX_DEADLINE_S: Final = 90 * 86_400
DEFAULT_QUARANTINE_WINDOW_S: Final = 86_400
DEFAULT_TOP_K_FRACTION: Final = 0.1
LARGEST: Final = 1e300
MAX_DEVICES: Final = 10_000_000
QUORUM_FIELD: Final = "config.rounds.quorum"
DEFAULT_TRIM_FRACTION: Final = 0.2
MAX_TRIM_FRACTION: Final = 0.49
DEFAULT_TRIM_FROM_COUNT: Final = 5
LEAST_TRIM_FROM_COUNT: Final = 3
MAX_SEED: Final = 2**53  # seeds stay readable in JSON
MAX_ATTRIBUTE: Final = 100
MAX_STRATEGY_NAME: Final = 100
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, surrogates and separators of lines and paragraphs."""
MAX_SETTINGS_BYTES: Final = (
    16_384  # of parameters and of labels: a signed task holds both in 65,536 bytes
)

MAX_DESCRIPTION_BYTES: Final = 9 * 2**18
"""Most bytes of a model's layout and the digests of its chunks, which a header holds within 4 MiB."""
MAX_DIGESTS_BYTES: Final = 2 * 2**20
"""Most bytes of the digests in the header of an update, as the proto says."""
DIGEST_BYTES: Final = 32


def complete(config: training_pb2.TrainingConfig) -> training_pb2.TrainingConfig:
    """Return a copy with every default filled in.

    Raises:
        InvalidRequestError: Names the first field that is out of range, with got and wanted.
    """
    done = training_pb2.TrainingConfig()
    done.CopyFrom(config)
    complete_query(done)
    _within("total_rounds", done.total_rounds, 0, 1_000_000)
    done.total_rounds = done.total_rounds or DEFAULT_ROUNDS
    _complete_selection(done.selection)
    _complete_rounds(done)
    _complete_transfer(done.transfer)
    _complete_safeguards(done.safeguards)
    _complete_failures(done)
    _check_device_training(done.device_training)
    _complete_evaluation(done.evaluation, done.rounds.quorum)
    _within("early_stop.patience_rounds", done.early_stop.patience_rounds, 0, 1_000_000)
    _check_grouping(done.evaluation)
    _complete_early_stop(done)
    _complete_objective(done)
    for number, bound in enumerate(done.release.bounds):
        _check_bound(f"release.bounds[{number}]", bound)
    _check_release(done.release)
    groups = checked_groups(done.groups, "config.groups")
    del done.groups[:]
    done.groups.extend(groups)
    done.strategy.name = done.strategy.name or "fedavg"
    if done.strategy.name == "scaffold":
        _complete_controls(done.transfer)
    if len(done.strategy.name) > MAX_STRATEGY_NAME:
        raise InvalidRequestError(
            f"strategy.name: longer than {MAX_STRATEGY_NAME} characters",
            field="config.strategy.name",
        )
    for name, value in done.strategy.parameters.items():
        _within(f"strategy.parameters[{name[:100]}]", value, -LARGEST, LARGEST)
    _check_reach(done)
    complete_masking(done)
    return done


def _complete_rounds(config: training_pb2.TrainingConfig) -> None:
    policy = config.rounds
    _complete_quorum(policy, _stated_size(config))
    _within("rounds.target", policy.target, 0, 10_000_000)
    policy.target = policy.target or policy.quorum
    if policy.target < policy.quorum:
        raise InvalidRequestError(
            f"rounds.target: got {policy.target}, want at least the quorum {policy.quorum}",
            field="config.rounds.target",
        )
    if not policy.HasField("deadline"):
        policy.deadline.CopyFrom(Duration(seconds=DEFAULT_DEADLINE_S))
    seconds = policy.deadline.seconds + policy.deadline.nanos / 1e9
    _within("rounds.deadline", seconds, 0.001, MAX_DEADLINE_S)
    if config.secure_aggregation.mode != training_pb2.SECURE_AGGREGATION_MODE_NEIGHBORS:
        policy.missed_quorum_action = (
            policy.missed_quorum_action or training_pb2.MISSED_QUORUM_ACTION_EXTEND
        )
    policy.late_update_action = policy.late_update_action or training_pb2.LATE_UPDATE_ACTION_REJECT
    _within("rounds.max_staleness", policy.max_staleness, 0, 10_000)


def _stated_size(config: training_pb2.TrainingConfig) -> int:
    """Return the configured number of devices of a round, 0 if it is not configured."""
    _within("rounds.device_count", config.rounds.device_count, 0, MAX_DEVICES)
    selected = _selected_count(config.selection)
    return config.rounds.device_count or selected


def _selected_count(policy: training_pb2.SelectionPolicy) -> int:
    """Return the most devices that a selection by number draws, 0 for any other."""
    _within("selection.device_count", policy.device_count, 0, MAX_DEVICES)
    _within("selection.over_selection", policy.over_selection, 0, 100)
    return math.ceil(policy.device_count * (1 + policy.over_selection))


def _complete_quorum(policy: training_pb2.RoundPolicy, size: int) -> None:
    """Derive an unset quorum: a majority of the configured number of devices.

    Raises:
        InvalidRequestError: There is no quorum, and no number of devices to derive one from.
    """
    _within("rounds.quorum", policy.quorum, 0, MAX_DEVICES)
    if not policy.quorum and not size:
        raise InvalidRequestError(
            "rounds.quorum: empty; state how many updates make a version, or with rounds.device_count or "
            "selection.device_count how many devices take part: a majority of them is then the quorum",
            field=QUORUM_FIELD,
        )
    policy.quorum = policy.quorum or size // 2 + 1
    if policy.device_count and policy.quorum > policy.device_count:
        raise InvalidRequestError(
            f"rounds.quorum: got {policy.quorum}, want at most rounds.device_count {policy.device_count}",
            field=QUORUM_FIELD,
        )


def _complete_selection(policy: training_pb2.SelectionPolicy) -> None:
    _within("selection.fraction", policy.fraction, 0, 1)
    _within("selection.seed", policy.seed, 0, MAX_SEED)
    policy.seed = policy.seed or 1 + secrets.randbelow(MAX_SEED)
    for condition in policy.capabilities:
        condition.comparison = condition.comparison or training_pb2.COMPARISON_AT_LEAST
        if not condition.capability:
            raise InvalidRequestError(
                "selection.capabilities: a condition names no capability",
                field="config.selection.capabilities",
            )
        _within(
            f"selection.capabilities[{condition.capability[:100]}].value",
            condition.value,
            -LARGEST,
            LARGEST,
        )
    _check_conditions(policy)


def _check_conditions(policy: training_pb2.SelectionPolicy) -> None:
    """Reject contradictory conditions on a capability."""
    spans: dict[str, tuple[float, float]] = {}
    for condition in policy.capabilities:
        least, most = spans.get(condition.capability, (-math.inf, math.inf))
        if condition.comparison != training_pb2.COMPARISON_AT_MOST:
            least = max(least, condition.value)
        if condition.comparison != training_pb2.COMPARISON_AT_LEAST:
            most = min(most, condition.value)
        if least > most:
            name = condition.capability[:MAX_ATTRIBUTE]
            raise InvalidRequestError(
                f"selection.capabilities[{name}]: wants at least {least:g} and at most {most:g}, which no device has",
                field="config.selection.capabilities",
            )
        spans[condition.capability] = least, most


def _check_release(policy: training_pb2.ReleasePolicy) -> None:
    """Reject contradictory bounds on a metric."""
    spans: dict[str, tuple[float, float]] = {}
    for bound in policy.bounds:
        least, most = spans.get(bound.metric, (-math.inf, math.inf))
        least = max(least, bound.min_value) if bound.HasField("min_value") else least
        most = min(most, bound.max_value) if bound.HasField("max_value") else most
        if least > most:
            raise InvalidRequestError(
                f"release.bounds: {bound.metric} has to be at least {least:g} and at most {most:g}, which none is",
                field="config.release.bounds",
            )
        spans[bound.metric] = least, most


def _check_reach(config: training_pb2.TrainingConfig) -> None:
    """Refuse a selection of fewer devices than a round needs."""
    policy = config.selection
    if not policy.device_count:
        return
    most = _selected_count(policy)
    if most < config.rounds.quorum:
        raise InvalidRequestError(
            f"selection.device_count: got {policy.device_count}, which with over_selection selects {most} devices; "
            f"want at least the quorum {config.rounds.quorum}",
            field="config.selection.device_count",
        )


def _check_grouping(policy: training_pb2.EvaluationPolicy) -> None:
    if not policy.group_by:
        return
    if not is_one_line(policy.group_by) or len(policy.group_by) > MAX_ATTRIBUTE:
        raise InvalidRequestError(
            f"evaluation.group_by: got {policy.group_by[:MAX_ATTRIBUTE]!r}, want the name of a device attribute, at "
            f"most {MAX_ATTRIBUTE} characters without control characters",
            field="config.evaluation.group_by",
        )
    if not policy.every_rounds:
        raise InvalidRequestError(
            "evaluation.group_by: groups the results of evaluations, of which there are none: set "
            "evaluation.every_rounds",
            field="config.evaluation.group_by",
        )


def _complete_transfer(policy: training_pb2.TransferPolicy) -> None:
    policy.update_kind = policy.update_kind or training_pb2.UPDATE_KIND_WEIGHTS
    policy.update_encoding = policy.update_encoding or training_pb2.ENCODING_NONE
    _complete_download(policy)
    _within("transfer.top_k_fraction", policy.top_k_fraction, 0, 1)
    top_k = policy.update_encoding == training_pb2.ENCODING_TOP_K
    if top_k and policy.update_kind != training_pb2.UPDATE_KIND_DELTA:
        raise InvalidRequestError(
            "transfer.update_kind: got weights, want delta with top-k updates",
            field="config.transfer.update_kind",
        )
    if top_k:
        policy.top_k_fraction = policy.top_k_fraction or DEFAULT_TOP_K_FRACTION
    _within("transfer.retained_rounds", policy.retained_rounds, 0, 1_000_000)
    if not policy.payload_retention:
        policy.payload_retention = training_pb2.PAYLOAD_RETENTION_LAST_ROUNDS
    policy.retained_rounds = policy.retained_rounds or 1


def _complete_controls(policy: training_pb2.TransferPolicy) -> None:
    """Let the devices' control variates of SCAFFOLD stay on them, and the coordinator's travel exactly."""
    for name in ("update_encoding", "download_encoding"):
        if getattr(policy, name) != training_pb2.ENCODING_NONE:
            raise InvalidRequestError(
                f"transfer.{name}: scaffold wants ENCODING_NONE: rounded control variates drift apart",
                field=f"config.transfer.{name}",
            )
    if LOCAL_PATTERN not in policy.local_tensors:
        policy.local_tensors.append(LOCAL_PATTERN)


def _complete_download(policy: training_pb2.TransferPolicy) -> None:
    policy.download_encoding = policy.download_encoding or training_pb2.ENCODING_NONE
    if policy.download_encoding == training_pb2.ENCODING_NONE:
        return
    if policy.download_encoding not in DOWNLOAD_ENCODINGS:
        names = {number: name for name, number in training_pb2.Encoding.items()}
        got = names.get(policy.download_encoding, policy.download_encoding)
        raise InvalidRequestError(
            f"transfer.download_encoding: got {got}, want ENCODING_FLOAT16 or ENCODING_BFLOAT16: the others lose "
            "too much of a version",
            field="config.transfer.download_encoding",
        )
    if policy.sealed:
        raise InvalidRequestError(
            "transfer.download_encoding: sealed payloads travel in full precision",
            field="config.transfer.download_encoding",
        )


def _complete_safeguards(policy: training_pb2.SafeguardPolicy) -> None:
    _within("safeguards.clip_norm", policy.clip_norm, 0, 1e30)
    _within("safeguards.max_norm", policy.max_norm, 0, 1e30)
    _within("safeguards.min_cosine_similarity", policy.min_cosine_similarity, -1, 1)
    _within("safeguards.max_example_count", policy.max_example_count, 0, MAX_EXAMPLES)
    _within("safeguards.quarantine_rejections", policy.quarantine_rejections, 0, 1_000_000)
    if not policy.HasField("quarantine_window"):
        policy.quarantine_window.CopyFrom(Duration(seconds=DEFAULT_QUARANTINE_WINDOW_S))


def _complete_failures(config: training_pb2.TrainingConfig) -> None:
    """Default the action on too many failures; without a limit, there is nothing to act on."""
    if not config.HasField("failures"):
        return
    policy = config.failures
    _within("failures.max_failures", policy.max_failures, 0, MAX_DEVICES)
    _within("failures.max_failed_fraction", policy.max_failed_fraction, 0, math.nextafter(1, 0))
    has_limit = policy.HasField("max_failures") or policy.HasField("max_failed_fraction")
    if policy.action and not has_limit:
        raise InvalidRequestError(
            "failures.action: set without a limit; set failures.max_failures or failures.max_failed_fraction",
            field="config.failures.action",
        )
    if has_limit:
        policy.action = policy.action or training_pb2.FAILURE_ACTION_END_ROUND
    else:
        config.ClearField("failures")


def _complete_evaluation(policy: training_pb2.EvaluationPolicy, round_quorum: int) -> None:
    _within("evaluation.every_rounds", policy.every_rounds, 0, 1_000_000)
    _within("evaluation.quorum", policy.quorum, 0, 10_000_000)
    policy.quorum = policy.quorum or round_quorum
    _within("evaluation.max_example_count", policy.max_example_count, 0, MAX_EXAMPLES)
    if not policy.HasField("trim_fraction"):
        policy.trim_fraction = DEFAULT_TRIM_FRACTION
    _within("evaluation.trim_fraction", policy.trim_fraction, 0, MAX_TRIM_FRACTION)
    policy.trim_from_count = policy.trim_from_count or DEFAULT_TRIM_FROM_COUNT
    _within("evaluation.trim_from_count", policy.trim_from_count, LEAST_TRIM_FROM_COUNT, 10_000_000)


def _check_device_training(settings: training_pb2.DeviceTraining) -> None:
    _within("device_training.local_epochs", settings.local_epochs, 0, 100_000)
    _within("device_training.batch_size", settings.batch_size, 0, 100_000_000)
    _within("device_training.learning_rate", settings.learning_rate, 0, 1e6)
    for name, value in settings.parameters.items():
        _within(f"device_training.parameters[{name[:100]}]", value, -LARGEST, LARGEST)
    parameters = training_pb2.DeviceTraining(parameters=settings.parameters)
    _check_size("device_training.parameters", parameters.ByteSize())
    labels = training_pb2.DeviceTraining(labels=settings.labels)
    _check_size("device_training.labels", labels.ByteSize())


def _check_size(name: str, size_bytes: int) -> None:
    if size_bytes > MAX_SETTINGS_BYTES:
        raise InvalidRequestError(
            f"{name}: got {size_bytes} bytes, want at most {MAX_SETTINGS_BYTES}",
            field=f"config.{name}",
        )


def _complete_early_stop(config: training_pb2.TrainingConfig) -> None:
    policy = config.early_stop
    if policy.HasField("target"):
        _within("early_stop.target", policy.target, -LARGEST, LARGEST)
    if not policy.metric and (policy.HasField("target") or policy.patience_rounds):
        _take_objective(policy, config.objective)
    if not policy.metric:
        return
    _check_metric("early_stop.metric", policy.metric)
    _require_evaluated("early_stop.metric", policy.metric)
    if not config.evaluation.every_rounds:
        raise InvalidRequestError(
            "early_stop.metric: goes by federated evaluation, which evaluation.every_rounds turns on",
            field="config.early_stop.metric",
        )
    if policy.minimize and policy.goal == training_pb2.METRIC_GOAL_MAXIMIZE:
        raise InvalidRequestError(
            "early_stop.goal: got METRIC_GOAL_MAXIMIZE with minimize, which contradict each other",
            field="config.early_stop.goal",
        )
    if policy.minimize:
        policy.goal = training_pb2.METRIC_GOAL_MINIMIZE
    policy.goal = resolved_goal("early_stop.goal", policy.metric, policy.goal)
    policy.minimize = policy.goal == training_pb2.METRIC_GOAL_MINIMIZE


def _take_objective(
    policy: training_pb2.EarlyStopPolicy, objective: training_pb2.Objective
) -> None:
    """Default the early-stopping metric to the objective's."""
    if not objective.metric:
        raise InvalidRequestError("early_stop.metric: empty", field="config.early_stop.metric")
    policy.metric = objective.metric
    policy.goal = policy.goal or objective.goal


def _complete_objective(config: training_pb2.TrainingConfig) -> None:
    objective, stop = config.objective, config.early_stop
    if not objective.metric:
        objective.metric = stop.metric or DEFAULT_METRIC
    if objective.metric == stop.metric:
        objective.goal = objective.goal or stop.goal
    _check_metric("objective.metric", objective.metric)
    if is_reserved(objective.metric):
        raise InvalidRequestError(
            f"objective.metric: got {objective.metric[:100]}, want the name without the prefix train_",
            field="config.objective.metric",
        )
    objective.goal = resolved_goal("objective.goal", objective.metric, objective.goal)


def _check_metric(name: str, metric: str) -> None:
    """Reject invalid metric names."""
    if not 1 <= len(metric) <= MAX_METRIC_NAME or not metric.isprintable():
        raise InvalidRequestError(
            f"{name}: got {metric[:MAX_METRIC_NAME]!r}, want 1 to {MAX_METRIC_NAME} printable characters",
            field=f"config.{name}",
        )


def _check_bound(name: str, bound: training_pb2.MetricBound) -> None:
    _check_metric(f"{name}.metric", bound.metric)
    _require_evaluated(f"{name}.metric", bound.metric)
    for side in ("min_value", "max_value"):
        if bound.HasField(side):
            _within(f"{name}.{side}", getattr(bound, side), -LARGEST, LARGEST)
    if not (bound.HasField("min_value") or bound.HasField("max_value")):
        raise InvalidRequestError(f"{name}: no bound", field=f"config.{name}")
    both = bound.HasField("min_value") and bound.HasField("max_value")
    if both and bound.min_value > bound.max_value:
        raise InvalidRequestError(
            f"{name}: got min_value {bound.min_value:g} above max_value {bound.max_value:g}, which no metric meets",
            field=f"config.{name}",
        )


def is_one_line(text: str) -> bool:
    """Return whether a text has no control characters or line breaks, so that it fits a table row."""
    return not any(unicodedata.category(character) in _CONTROL for character in text)


def require_trainable(
    config: training_pb2.TrainingConfig, manifest: Manifest, max_payload_bytes: int
) -> None:
    """Refuse a model that devices cannot train under a configuration.

    Args:
        config: Of the training session.
        manifest: The model's layout.
        max_payload_bytes: Longest payload that this coordinator takes.

    Raises:
        InvalidManifestError: Its updates cannot be encoded or are too long, or privacy cannot cover its types.
    """
    require_query_layout(config, manifest)
    number = config.transfer.update_encoding
    encoding = training_pb2.Encoding.Name(number).removeprefix("ENCODING_").lower()
    try:
        wire = update_manifest(config, manifest)
    except BadManifestError as error:
        raise _unusable(f"updates as {encoding}: {error}") from error
    _require_describable(manifest, wire)
    local = next(
        (
            spec.name
            for spec in manifest.tensors
            if is_local(spec.name, config.transfer.local_tensors)
        ),
        None,
    )
    if local is not None:
        raise _unusable(
            f"tensor {local!r} matches transfer.local_tensors: it stays on each device, so leave it out of the model"
        )
    uncontrolled = missing_control(manifest) if config.strategy.name == "scaffold" else None
    if uncontrolled is not None:
        raise _unusable(
            f"tensor {uncontrolled!r} has no control variate {CONTROL + uncontrolled!r} of its shape and type, which "
            "scaffold needs: add them with qflare_client.Scaffold.initial"
        )
    if wire.size_bytes > max_payload_bytes:
        raise _unusable(
            f"updates as {encoding}: got {wire.size_bytes} bytes, want at most {max_payload_bytes}"
        )
    too_many = require_room(config, manifest)
    if too_many is not None:
        raise _unusable(too_many)
    wide = next((spec.name for spec in manifest.tensors if spec.dtype is DType.FLOAT64), None)
    if config.privacy.noise_multiplier and wide is not None:
        raise _unusable(
            f"tensor {wide!r} is float64: the low bits of noise in it would tell what it was added to; a private "
            "training session takes float32 and shorter"
        )


def _require_describable(manifest: Manifest, wire: Manifest) -> None:
    """Refuse a model whose layout and digests do not fit into the header of a download or an upload."""
    described = manifest.to_proto().ByteSize() + DIGEST_BYTES * manifest.chunk_count
    if described > MAX_DESCRIPTION_BYTES:
        raise _unusable(
            f"layout and digests of its chunks take {described} bytes, want at most {MAX_DESCRIPTION_BYTES}: devices "
            "get them in one message"
        )
    if DIGEST_BYTES * wire.chunk_count > MAX_DIGESTS_BYTES:
        raise _unusable(
            f"updates have {wire.chunk_count} chunks, want at most {MAX_DIGESTS_BYTES // DIGEST_BYTES}"
        )


def _unusable(reason: str) -> InvalidManifestError:
    return InvalidManifestError(f"manifest: {reason}", field="header.manifest")


def _require_evaluated(name: str, metric: str) -> None:
    """Reject a release gate on self-reported training metrics: any contributor could open it."""
    if is_reserved(metric):
        raise InvalidRequestError(
            f"{name}: got {metric[:100]}, want a metric of federated evaluation",
            field=f"config.{name}",
        )


def _within(name: str, got: float, least: float, most: float) -> None:
    if not least <= got <= most:  # false for NaN as well
        raise InvalidRequestError(
            f"{name}: got {got:g}, want {least:g} to {most:g}", field=f"config.{name}"
        )


def deadline_s(config: training_pb2.TrainingConfig) -> float:
    """Return the longest time that a round is open, in seconds."""
    return config.rounds.deadline.seconds + config.rounds.deadline.nanos / 1e9


def download_encoding(config: training_pb2.TrainingConfig) -> Encoding:
    """Return the download encoding of a training session."""
    return Encoding.from_number(config.transfer.download_encoding)
