"""Whatever a training session can be created with can be trained: names, element types, encodings, settings."""

from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from qflare.tensors import DType, Manifest, TensorSpec
from qflare.tensors.encodings import (
    INDEX_SUFFIX,
    SCALE_SUFFIX,
    VALUE_SUFFIX,
    Encoding,
    encode,
    wire_manifest,
)
from qflare.tensors.vectors import VectorLayout, VectorReader, float_count
from qflare.v1 import training_pb2
from qflare_server.errors import InvalidManifestError, InvalidRequestError, StrategyRefusedError
from qflare_server.storage.training_configs import from_json, to_json
from qflare_server.strategies import Contribution, NotEnoughUpdatesError, begin
from qflare_server.strategies.catalogue import RULES
from qflare_server.strategies.testkit import reader_of
from qflare_server.training.config import complete, require_trainable
from qflare_server.training.strategy import build_strategy, stored_strategy, warnings_of
from tests.support.use_cases import completed

LIMIT = 100_000
SUFFIXES = st.sampled_from(["", SCALE_SUFFIX, INDEX_SUFFIX, VALUE_SUFFIX])
STEMS = st.sampled_from(["w", "v", "x" * 250, "x" * 252, "é" * 125])
NAMES = st.tuples(STEMS, SUFFIXES).map("".join).filter(lambda name: len(name.encode()) <= 256)
SPECS = st.builds(
    TensorSpec,
    name=NAMES,
    dtype=st.sampled_from(DType),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
)
MANIFESTS = st.lists(SPECS, min_size=1, max_size=5, unique_by=lambda spec: spec.name).map(
    lambda specs: Manifest(tuple(specs))
)
ENCODINGS = st.sampled_from([0, *Encoding])
FRACTIONS = st.sampled_from([0.0, 1e-9, 0.3, 1.0])


@given(MANIFESTS, ENCODINGS, FRACTIONS, st.booleans())
def test_a_model_that_is_taken_has_updates(
    manifest: Manifest, encoding: int, fraction: float, private: bool
) -> None:
    """An update of it is encoded by a device and read by the coordinator."""
    config = configured(encoding, fraction, private=private)
    try:
        require_trainable(config, manifest, LIMIT)
    except InvalidManifestError:
        return

    chosen = Encoding.from_number(encoding)
    share = config.transfer.top_k_fraction or 1.0
    arrays = {spec.name: np.ones(spec.shape, spec.dtype.numpy) for spec in manifest.tensors}
    wire = wire_manifest(manifest, chosen, share)
    encoded = encode(arrays, manifest, chosen, share)
    data = b"".join(encoded[spec.name].tobytes() for spec in wire.tensors)
    reader = VectorReader(
        VectorLayout(manifest, chosen, wire), lambda at, size: data[at : at + size]
    )
    values = reader.read(0, float_count(manifest))

    assert len(data) == wire.size_bytes <= LIMIT
    expected = [0.0, 1.0] if chosen is Encoding.TOP_K else [1.0]
    assert np.isclose(values[:, None], expected, rtol=1e-2).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "other", "encoding"),
    [
        ("w", "w#scale", Encoding.INT8),
        ("w", "w#index", Encoding.TOP_K),
        ("w", "w#value", Encoding.TOP_K),
        ("x" * 252, "y", Encoding.INT8),
        ("x" * 251, "y", Encoding.TOP_K),
    ],
)
def test_names_that_an_encoding_needs_are_refused_with_the_reason(
    name: str, other: str, encoding: Encoding
) -> None:
    manifest = Manifest(
        (TensorSpec(name, DType.FLOAT32, (3,)), TensorSpec(other, DType.INT32, (3,)))
    )
    reason = f"updates as {encoding.name.lower()}: tensor name"

    with pytest.raises(InvalidManifestError, match=reason):
        require_trainable(configured(encoding), manifest, LIMIT)


def configured(
    encoding: int, fraction: float = 0.0, *, private: bool = False
) -> training_pb2.TrainingConfig:
    transfer = training_pb2.TransferPolicy(
        update_kind=training_pb2.UPDATE_KIND_DELTA,
        update_encoding=training_pb2.Encoding.ValueType(encoding),
        top_k_fraction=fraction,
    )
    privacy = training_pb2.PrivacyPolicy(noise_multiplier=1.0 if private else 0.0)
    return completed(training_pb2.TrainingConfig(transfer=transfer, privacy=privacy))


def test_an_encoding_that_makes_updates_too_long_is_refused() -> None:
    """Top-k of everything takes eight bytes an element."""
    manifest = Manifest((TensorSpec("w", DType.FLOAT16, (LIMIT // 4,)),))

    with pytest.raises(InvalidManifestError, match="200000 bytes, want at most 100000"):
        require_trainable(configured(Encoding.TOP_K, 1.0), manifest, LIMIT)


def test_a_private_session_refuses_float64_with_the_reason() -> None:
    manifest = Manifest((TensorSpec("w", DType.FLOAT64, (3,)),))

    with pytest.raises(InvalidManifestError, match="low bits"):
        require_trainable(configured(0, private=True), manifest, LIMIT)


PARAMETERS = st.dictionaries(
    st.sampled_from(
        [
            "server_learning_rate",
            "momentum",
            "beta1",
            "beta2",
            "tau",
            "initial_second_moment",
            "bias_correction",
            "byzantine_count",
            "selected_count",
            "trimmed_fraction",
            "smoothing",
            "max_iterations",
            "proximal_mu",
            "clip_norm",
        ]
    ),
    st.sampled_from(
        [0.0, 1.0, 2.0, 0.25, 1e-3, 1e-320, 1e6, 1e300, -1.0, float("inf"), float("nan")]
    ),
    max_size=3,
)
SAFEGUARDS = st.builds(
    training_pb2.SafeguardPolicy,
    clip_norm=st.sampled_from([0.0, 1.0, 1e-30]),
    max_norm=st.sampled_from([0.0, 1e3, 1e30]),
    min_cosine_similarity=st.sampled_from([-1.0, 0.0]),
)
PRIVACY = st.sampled_from(
    [
        training_pb2.PrivacyPolicy(),
        training_pb2.PrivacyPolicy(
            noise_multiplier=1.0, clip_norm=1.0, delta=1e-5, epsilon_budget=50.0
        ),
    ]
)


@given(
    name=st.sampled_from(sorted(RULES)),
    optimizer=st.sampled_from(["", "plain", "momentum", "adam", "yogi", "adagrad"]),
    parameters=PARAMETERS,
    safeguards=SAFEGUARDS,
    privacy=PRIVACY,
    quorum=st.integers(1, 9),
    uniform=st.booleans(),
)
def test_settings_that_are_taken_make_versions(
    name: str,
    optimizer: str,
    parameters: dict[str, float],
    safeguards: training_pb2.SafeguardPolicy,
    privacy: training_pb2.PrivacyPolicy,
    quorum: int,
    uniform: bool,
) -> None:
    """From a quorum of ordinary updates a finite version comes out, or a safeguard has refused them."""
    strategy = training_pb2.StrategyConfig(
        name=name, optimizer=optimizer, parameters=parameters, uniform_weights=uniform
    )
    wanted = training_pb2.TrainingConfig(
        strategy=strategy,
        safeguards=safeguards,
        privacy=privacy,
        rounds=training_pb2.RoundPolicy(quorum=quorum),
    )
    try:
        config = completed(wanted)
        build_strategy(config)
    except (InvalidRequestError, StrategyRefusedError):
        return

    assert isinstance(warnings_of(config), list)
    stored = stored_strategy(from_json(to_json(config)))
    generator = np.random.default_rng(quorum)
    aggregation = begin(stored, 40, reader_of(np.ones(40, np.float32)), noise_seed=bytes(32))
    for number in range(quorum):
        delta = 0.1 * generator.standard_normal(40).astype(np.float32)
        aggregation.add(Contribution(f"{number}", 10, reader_of(delta)))
    try:
        pieces = list(aggregation.finish())
    except NotEnoughUpdatesError:
        assert aggregation.outcome.rejected
        return
    for piece in pieces:
        values: list[Any] = [piece.weights, *piece.vectors.values()]
        assert all(np.isfinite(value).all() for value in values)


VALUES = st.sampled_from([-1e300, -1.0, 0.0, 0.5, 1.0, 2.0, 1e300, float("nan"), float("inf")])
COUNTS = st.sampled_from([-1, 0, 1, 2, 5, 10, 10_000_000, 2**31 - 1])
CONDITIONS = st.builds(
    training_pb2.CapabilityFilter,
    capability=st.sampled_from(["", "ram_mib", "cores"]),
    comparison=st.sampled_from([0, 1, 2, 3]),
    value=VALUES,
)
BOUNDS = st.builds(
    training_pb2.MetricBound,
    metric=st.sampled_from(["accuracy", "loss", "train_loss", ""]),
    min_value=st.none() | VALUES,
    max_value=st.none() | VALUES,
)


@given(
    rounds=st.builds(
        training_pb2.RoundPolicy,
        quorum=COUNTS,
        target=COUNTS,
        device_count=COUNTS,
        deadline=st.none() | st.builds(Duration, seconds=st.sampled_from([-1, 0, 1, 2**40])),
        max_staleness=COUNTS,
    ),
    selection=st.builds(
        training_pb2.SelectionPolicy,
        fraction=VALUES,
        device_count=COUNTS,
        over_selection=VALUES | st.just(100.0),
        capabilities=st.lists(CONDITIONS, max_size=4),
    ),
    release=st.builds(training_pb2.ReleasePolicy, bounds=st.lists(BOUNDS, max_size=4)),
    evaluation=st.builds(
        training_pb2.EvaluationPolicy,
        every_rounds=COUNTS,
        group_by=st.sampled_from(["", "device_type", "two\nlines", "x" * 101]),
        quorum=COUNTS,
        trim_fraction=st.none() | VALUES,
        trim_from_count=COUNTS,
    ),
    safeguards=st.builds(
        training_pb2.SafeguardPolicy,
        clip_norm=VALUES,
        max_norm=VALUES,
        max_example_count=COUNTS,
        quarantine_rejections=COUNTS,
    ),
    total_rounds=COUNTS,
)
def test_settings_that_are_taken_do_not_contradict_each_other(
    rounds: training_pb2.RoundPolicy,
    selection: training_pb2.SelectionPolicy,
    release: training_pb2.ReleasePolicy,
    evaluation: training_pb2.EvaluationPolicy,
    safeguards: training_pb2.SafeguardPolicy,
    total_rounds: int,
) -> None:
    """A device can be selected, a round can close, a version can be released."""
    wanted = training_pb2.TrainingConfig(
        rounds=rounds,
        selection=selection,
        release=release,
        evaluation=evaluation,
        safeguards=safeguards,
        total_rounds=total_rounds,
    )
    try:
        config = complete(wanted)
        build_strategy(config)
    except (InvalidRequestError, StrategyRefusedError):
        return

    policy = config.selection
    limits: dict[str, list[float]] = {}
    for condition in policy.capabilities:
        limits.setdefault(condition.capability, []).append(condition.value)
    for name, values in limits.items():
        assert any(
            all(
                matches(condition, value)
                for condition in policy.capabilities
                if condition.capability == name
            )
            for value in values
        ), name
    reached = policy.device_count * (1 + policy.over_selection) if policy.device_count else np.inf
    assert 1 <= config.rounds.quorum <= config.rounds.target
    assert config.rounds.quorum <= np.ceil(reached)
    assert config.rounds.target <= np.ceil(reached) or warnings_of(config)
    assert config.rounds.deadline.seconds + config.rounds.deadline.nanos > 0
    for metric in {bound.metric for bound in config.release.bounds}:
        spans = [bound for bound in config.release.bounds if bound.metric == metric]
        least = max(
            (item.min_value for item in spans if item.HasField("min_value")), default=-np.inf
        )
        most = min((item.max_value for item in spans if item.HasField("max_value")), default=np.inf)
        assert least <= most, metric
    assert config.release.bounds == [] or config.evaluation.every_rounds or warnings_of(config)
    assert config.evaluation.every_rounds <= config.total_rounds or warnings_of(config)
    assert config.evaluation.every_rounds or not config.evaluation.group_by


def matches(condition: training_pb2.CapabilityFilter, value: float) -> bool:
    """Return whether a device with this value meets a condition."""
    return {
        training_pb2.COMPARISON_AT_LEAST: value >= condition.value,
        training_pb2.COMPARISON_AT_MOST: value <= condition.value,
        training_pb2.COMPARISON_EQUAL: value == condition.value,
    }[condition.comparison]


@pytest.mark.parametrize(
    "wanted",
    [
        {"release": {"bounds": [{"metric": "a", "min_value": 2, "max_value": 1}]}},
        {"release": {"bounds": [{"metric": "a", "min_value": 2}, {"metric": "a", "max_value": 1}]}},
        {
            "selection": {
                "capabilities": [
                    {"capability": "a", "comparison": "COMPARISON_AT_LEAST", "value": 2},
                    {"capability": "a", "comparison": "COMPARISON_EQUAL", "value": 1},
                ]
            }
        },
        {"rounds": {"quorum": 3, "target": 2}},
        {"rounds": {"quorum": 3, "device_count": 2}},
        {"rounds": {"quorum": 3}, "selection": {"device_count": 2}},
        {"evaluation": {"group_by": "device_type"}},
        {"evaluation": {"every_rounds": 1, "group_by": "two\nlines"}},
    ],
    ids=str,
)
def test_contradictions_are_refused_with_the_reason(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=": "):
        completed(from_json(wanted))


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ({"rounds": {"target": 9}, "selection": {"device_count": 3}}, "until its deadline"),
        ({"release": {"bounds": [{"metric": "a", "min_value": 1}]}}, "every_rounds"),
        ({"total_rounds": 3, "evaluation": {"every_rounds": 4}}, "no version is evaluated"),
        ({"safeguards": {"clip_norm": 2, "max_norm": 2}}, "is rejected"),
    ],
    ids=str,
)
def test_settings_without_effect_warn(wanted: dict[str, Any], part: str) -> None:
    assert any(part in text for text in warnings_of(completed(from_json(wanted))))
    assert warnings_of(completed(training_pb2.TrainingConfig())) == []
