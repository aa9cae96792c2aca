"""Updates at the ends of every element type, through every strategy, encoding, kind and safeguard.

No single update stops a round or makes a version that cannot be used; a robust rule is not even moved by it; and only
its sender is refused.
"""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from qflare.tensors import Array, Manifest, assemble
from qflare.tensors.download_encodings import download_manifest
from qflare.tensors.encodings import Encoding, encode
from qflare.v1 import training_pb2
from qflare_server.errors import InvalidUpdateError
from qflare_server.verification import recompute_version
from tests.contract.conftest import MakeCore
from tests.support.use_cases import CoordinatorHarness

DEVICES = 8
"""As many as Bulyan needs to withstand one: four times the hostile ones, and three, and one more."""
ROUNDS = 2
LATER_ROUNDS = 20
SIZE = 24
DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
MOST = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": 3.4028234e38, "float64": 1.79e308}
ROBUST: dict[str, dict[str, float]] = {
    "median": {},
    "trimmed_mean": {"trimmed_fraction": 0.2},
    "krum": {"byzantine_count": 1},
    "multi_krum": {"byzantine_count": 1},
    "bulyan": {"byzantine_count": 1},
    "geometric_median": {},
}
MEANS: dict[str, dict[str, float]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {},
    "fedadam": {},
    "fedyogi": {},
    "fedadagrad": {},
    "fedbuff": {},
}
OPTIMIZERS = ["", "momentum", "adam", "yogi", "adagrad"]
MAGNITUDES = [1.7976931348623157e308, 1e306, 1e200, 1e155, 1e150, 3.4028234e38, 3.39e38, 65504.0]
MAGNITUDES += [1e30, 1e4, 1.0, 0.0, 6e-8, 1.2e-38, 1e-45, 2.3e-308, 5e-324]
Patterns = st.sampled_from(["everywhere", "one element", "alternating", "growing"])


@dataclass(frozen=True)
class Case:
    """A training session, and what its hostile device sends."""

    dtype: str
    strategy: str
    optimizer: str
    parameters: dict[str, float]
    kind: int
    encoding: Encoding
    download: Encoding
    value: float
    pattern: str
    place: int
    examples: int
    safeguards: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the training session."""
        return {
            "strategy": training_pb2.StrategyConfig(
                name=self.strategy, optimizer=self.optimizer, parameters=self.parameters
            ),
            "safeguards": training_pb2.SafeguardPolicy(**self.safeguards),  # type: ignore[arg-type]
            "rounds": training_pb2.RoundPolicy(quorum=DEVICES),
            "total_rounds": ROUNDS + 1,
            "transfer": training_pb2.TransferPolicy(
                update_kind=training_pb2.UpdateKind.ValueType(self.kind),
                update_encoding=training_pb2.Encoding.ValueType(self.encoding),
                download_encoding=training_pb2.Encoding.ValueType(self.download),
                top_k_fraction=0.5 if self.encoding is Encoding.TOP_K else 0.0,
                payload_retention=training_pb2.PAYLOAD_RETENTION_ALL,
            ),
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    strategy = draw(st.sampled_from([*ROBUST, *MEANS]))
    dtype = draw(st.sampled_from([*DTYPES]))
    kind = draw(st.sampled_from([training_pb2.UPDATE_KIND_WEIGHTS, training_pb2.UPDATE_KIND_DELTA]))
    encodings = [Encoding.FULL_PRECISION, Encoding.FLOAT16, Encoding.BFLOAT16, Encoding.INT8]
    if kind == training_pb2.UPDATE_KIND_DELTA:
        encodings.append(Encoding.TOP_K)
    screen = draw(st.sampled_from(["", "clip_norm", "max_norm", "min_cosine_similarity"]))
    bound = {"clip_norm": 1.0, "max_norm": 1e3, "min_cosine_similarity": -0.9}.get(screen, 0.0)
    downloads = [Encoding.FULL_PRECISION]
    if dtype in {"float32", "float64"}:
        downloads += [Encoding.FLOAT16, Encoding.BFLOAT16]
    sign = draw(st.sampled_from([1.0, -1.0]))
    return Case(
        dtype=dtype,
        strategy=strategy,
        optimizer="" if strategy in MEANS else draw(st.sampled_from(OPTIMIZERS)),
        parameters=dict({**ROBUST, **MEANS}[strategy]),
        kind=kind,
        encoding=draw(st.sampled_from(encodings)),
        download=draw(st.sampled_from(downloads)),
        value=sign * draw(st.sampled_from(MAGNITUDES)),
        pattern=draw(Patterns),
        place=draw(st.sampled_from([0, 3, DEVICES - 1])),
        examples=draw(st.sampled_from([1, 10, 2**40])),
        safeguards={screen: bound} if screen else {},
    )


def narrowed(values: Array, dtype: str) -> Array:
    """Convert to an element type; what exceeds it becomes its largest number."""
    most = MOST[dtype]
    return np.clip(values, -most, most).astype(DTYPES[dtype])


def base(dtype: str) -> dict[str, Array]:
    return {
        "step": np.array([1], np.int64),
        "w": narrowed(np.linspace(-2.0, 2.0, SIZE), dtype),
    }


def honest(case: Case, device: int, number: int, version: Array) -> dict[str, Array]:
    """Return a small change of a version, or the version with it."""
    random = np.random.default_rng([device, number])
    values = 0.25 + random.uniform(-0.1, 0.1, SIZE)
    if case.kind == training_pb2.UPDATE_KIND_WEIGHTS:
        values += version
    return {"step": np.array([number], np.int64), "w": narrowed(values, case.dtype)}


def hostile(case: Case) -> dict[str, Array]:
    values = np.full(SIZE, case.value)
    if case.pattern == "one element":
        values[1:] = 0.25
    elif case.pattern == "alternating":
        values[::2] *= -1
    elif case.pattern == "growing":
        values *= np.linspace(0.0, 1.0, SIZE)
    return {"step": np.array([99], np.int64), "w": narrowed(values, case.dtype)}


def send(
    core: CoordinatorHarness, case: Case, session_id: str, device: int, number: int
) -> str | None:
    """Submit a device's update of a round; return its id, None where its encoding cannot hold it."""
    is_hostile = device == case.place and number == ROUNDS
    version = downloaded(core, case, session_id, number - 1)
    arrays = hostile(case) if is_hostile else honest(case, device, number, version)
    manifest = Manifest.from_arrays(arrays)
    try:
        encoded = encode(arrays, manifest, case.encoding, 0.5)
    except ValueError:
        assert is_hostile
        return None
    examples = case.examples if is_hostile else 10
    draft = core.draft(f"device-{device}", session_id, encoded, examples=examples)
    draft.statement.kind = training_pb2.UpdateKind.ValueType(case.kind)
    draft.statement.encoding = training_pb2.Encoding.ValueType(case.encoding)
    draft.statement.base_encoding = training_pb2.Encoding.ValueType(case.download)
    try:
        return core.send(draft).update_id
    except InvalidUpdateError:
        assert is_hostile
        return None


def downloaded(core: CoordinatorHarness, case: Case, session_id: str, version: int) -> Array:
    """Return a version's weights as a device gets them, after the checks that it makes."""
    delivery = core.deliveries.find(session_id, version, encoding=int(case.download))
    chunks = [data for _, data in core.deliveries.chunks(delivery, 0)]
    manifest = Manifest.from_arrays(base(case.dtype))
    arrays = assemble(download_manifest(manifest, case.download), chunks)
    return arrays["w"].astype(np.float64)


@pytest.fixture
def fleet(make_core: MakeCore) -> CoordinatorHarness:
    core = make_core()
    core.add_devices(DEVICES)
    return core


@settings(
    max_examples=40,
    phases=[Phase.generate, Phase.shrink],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_one_update_neither_stops_a_round_nor_decides_it(
    fleet: CoordinatorHarness, case: Case
) -> None:
    """The first round is honest, which gives optimizers a momentum and screens a direction."""
    core = fleet
    session_id = core.start(base(case.dtype), **case.config)
    for number in range(1, ROUNDS + 1):
        sent = [send(core, case, session_id, device, number) for device in range(DEVICES)]
        if sent[case.place] is None:
            event("refused at upload")
            return
        core.settle()
        check_round(core, case, session_id, number)
    judge(core, case, session_id, sent[case.place] or "")


def check_round(core: CoordinatorHarness, case: Case, session_id: str, number: int) -> None:
    """Check that a round has made a version which a device can load and anyone can make again."""
    assert core.round(session_id, number).state == "published"
    assert np.isfinite(downloaded(core, case, session_id, number)).all()
    again = recompute_version(core.context, session_id, number)
    assert (again.recomputed, again.differences, again.by_record) == (True, (), False)


def judge(core: CoordinatorHarness, case: Case, session_id: str, hostile_id: str) -> None:
    """Check that nobody but the hostile device is refused, and that it does not lead a robust rule."""
    rows = {row.id: row for row in core.updates(session_id, ROUNDS)}
    reasons = {key: row.state_reason or "" for key, row in rows.items() if row.state == "rejected"}
    refused = {key: text for key, text in reasons.items() if not text.startswith("left out: ")}
    event(f"hostile {'refused' if hostile_id in reasons else 'folded'}")
    assert not refused.keys() - {hostile_id}
    if case.strategy in ROBUST and not case.optimizer:
        before = downloaded(core, case, session_id, ROUNDS - 1)
        moved = downloaded(core, case, session_id, ROUNDS) - before
        slack = 0.01 + 0.02 * np.abs(before).max()
        least = (
            0.0 if case.encoding is Encoding.TOP_K else 0.15
        )  # a change that is not sent is none
        assert np.all((moved > least - slack) & (moved < 0.35 + slack)), moved


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_an_optimizer_remembers_of_an_update_does_not_stop_later_rounds(
    make_core: MakeCore, dtype: str
) -> None:
    """Momentum repeats an accepted update ten times over, which takes elements out of range long after it."""
    core = make_core()
    core.add_devices(DEVICES)
    case = Case(
        dtype,
        "fedavgm",
        "",
        {},
        training_pb2.UPDATE_KIND_DELTA,
        Encoding.FULL_PRECISION,
        Encoding.FULL_PRECISION,
        MOST[dtype],
        "alternating",
        place=0,
        examples=10,
    )
    config = {**case.config, "total_rounds": LATER_ROUNDS}
    session_id = core.start(base(dtype), **config)
    for number in range(1, LATER_ROUNDS + 1):
        for device in range(DEVICES):
            send(core, case, session_id, device, number)
        core.settle()
        check_round(core, case, session_id, number)
