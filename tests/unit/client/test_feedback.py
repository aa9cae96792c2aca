"""What top-k updates leave out is sent later: nothing is lost, whatever breaks between two updates."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.tensors import Array, Manifest, assemble
from qflare.tensors.encodings import INDEX_SUFFIX, VALUE_SUFFIX
from qflare.v1 import security_pb2, training_pb2
from qflare_client.errors import KeyStoreError, UnavailableError
from qflare_client.keystore.passphrase import passphrase_coding
from qflare_client.keystore.store import KeyStore
from qflare_client.models.download import GlobalModel
from qflare_client.models.error_feedback import ErrorFeedback
from qflare_client.models.submission import Contribution, make_payload_with_residual

SESSION = "../session"  # a coordinator's words, which are no path
LOG = "qflare_client.models.error_feedback"


def zeros(size: int) -> dict[str, Array]:
    return {
        "single": np.zeros(size, np.float32),
        "double": np.zeros((2, size)),
        "half": np.zeros(size, np.float16),
        "brain": np.zeros((), ml_dtypes.bfloat16),
        "count": np.array(1, np.int64),
    }


def model(arrays: dict[str, Array]) -> GlobalModel:
    return GlobalModel(
        training_session_id=SESSION,
        version=0,
        digest="",
        arrays=arrays,
        manifest=Manifest.from_arrays(arrays),
        metrics={},
        model_type="",
        architecture={},
        released=False,
        statement=security_pb2.ModelStatement(),
        envelope=security_pb2.SignedEnvelope(),
    )


def send(
    delta: dict[str, Array], residual: dict[str, Array], fraction: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what a top-k update sends of a delta, as float64 tensors, and the next residual."""
    base = model({name: np.zeros_like(array) for name, array in delta.items()})
    policy = training_pb2.TransferPolicy(
        update_kind=training_pb2.UPDATE_KIND_DELTA,
        update_encoding=training_pb2.ENCODING_TOP_K,
        top_k_fraction=fraction,
    )
    contribution = Contribution(base, delta, 1, {})
    payload, following = make_payload_with_residual(contribution, policy, residual)
    arrays = assemble(payload.manifest, payload.chunks_from(0))
    sent = {}
    for name in following:
        dense = np.zeros(delta[name].size)
        dense[arrays[name + INDEX_SUFFIX]] = arrays[name + VALUE_SUFFIX]
        sent[name] = dense.reshape(delta[name].shape)
    return sent, following


def drawn(generator: np.random.Generator, size: int, *, exact: bool) -> dict[str, Array]:
    """Return a delta; an exact one has small multiples of 2^-4, whose sums no type rounds."""

    def some(shape: Any) -> Any:
        if exact:
            return generator.integers(-64, 65, shape) / 16.0
        return generator.normal(size=shape) * 10.0 ** generator.integers(-6, 2)

    return {
        name: np.asarray(some(array.shape)).astype(array.dtype)
        if name != "count"
        else np.array(5, np.int64)
        for name, array in zeros(size).items()
    }


@given(
    seed=st.integers(0, 2**32),
    rounds=st.integers(1, 12),
    size=st.integers(1, 40),
    fraction=st.floats(0.01, 1),
)
def test_what_was_sent_and_what_is_left_are_what_training_changed(
    seed: int, rounds: int, size: int, fraction: float
) -> None:
    generator = np.random.default_rng(seed)
    total = {name: np.zeros(array.shape) for name, array in zeros(size).items()}
    sent_in_all = {name: np.zeros(array.shape) for name, array in zeros(size).items()}
    residual: dict[str, Array] = {}
    for _ in range(rounds):
        delta = drawn(generator, size, exact=True)
        sent, residual = send(delta, residual, fraction)
        for name, part in sent.items():
            total[name] += delta[name].astype(np.float64)
            sent_in_all[name] += part

    for name, left in residual.items():
        np.testing.assert_array_equal(sent_in_all[name] + left, total[name])


@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 12), fraction=st.floats(0.01, 1))
def test_any_numbers_are_kept_but_for_the_rounding_of_one_addition_a_round(
    seed: int, rounds: int, fraction: float
) -> None:
    generator = np.random.default_rng(seed)
    size = 20
    total = {name: np.zeros(array.shape) for name, array in zeros(size).items()}
    bound = {name: np.zeros(array.shape) for name, array in zeros(size).items()}
    sent_in_all = {name: np.zeros(array.shape) for name, array in zeros(size).items()}
    residual: dict[str, Array] = {}
    for _ in range(rounds):
        delta = drawn(generator, size, exact=False)
        before = residual
        sent, residual = send(delta, residual, fraction)
        for name, part in sent.items():
            wide = delta[name].astype(np.float64)
            total[name] += wide
            bound[name] += 2.0**-24 * np.abs(wide + before.get(name, np.zeros(())))
            sent_in_all[name] += part

    for name, left in residual.items():
        assert left.dtype == (np.float64 if name == "double" else np.float32)
        error = np.abs(sent_in_all[name] + left - total[name])
        assert (error <= bound[name] * 1.01 + 1e-14).all()


def test_a_small_change_is_sent_once_it_has_added_up() -> None:
    delta = {"w": np.array([1.0, 0.3], np.float32)}
    residual: dict[str, Array] = {}
    sent = []
    for _ in range(4):
        part, residual = send(delta, residual, 0.5)
        sent.append(part["w"].tolist())

    assert [row[1] == 0 for row in sent] == [True, True, True, False]
    assert sent[3] == [0.0, pytest.approx(1.2)]


def test_without_top_k_nothing_is_left() -> None:
    delta = {"w": np.array([1.0, 0.3], np.float32)}
    base = model({"w": np.zeros(2, np.float32)})
    policy = training_pb2.TransferPolicy(
        update_kind=training_pb2.UPDATE_KIND_DELTA, update_encoding=training_pb2.ENCODING_INT8
    )

    _, residual = make_payload_with_residual(Contribution(base, delta, 1, {}), policy, {})

    assert residual == {}


# The key store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[KeyStore]:
    with KeyStore(home) as opened:
        yield opened


BASE = Manifest.from_arrays({"w": np.zeros(3, np.float32), "n": np.array(1)})
LEFT = {"w": np.array([0.5, 0.0, -0.25], np.float32)}


def feedback(store: KeyStore, *accepted: str) -> ErrorFeedback:
    return ErrorFeedback(store, lambda update_id: update_id in accepted)


def kept(store: KeyStore, *accepted: str) -> list[float]:
    """Return what a fresh process finds."""
    return [
        number
        for array in feedback(store, *accepted).residual(SESSION, BASE).values()
        for number in array.tolist()
    ]


def commit(store: KeyStore) -> None:
    made = feedback(store)
    made.stage(SESSION, "one", LEFT)
    made.commit(SESSION, LEFT)


def residual_file(home: Path, suffix: str = "") -> Path:
    digest = hashlib.sha256(SESSION.encode()).hexdigest()[:32]
    return home / f"residual-{digest}{suffix}"


def test_nothing_is_left_at_first(store: KeyStore) -> None:
    assert feedback(store).residual(SESSION, BASE) == {}


def test_a_residual_survives_a_restart(store: KeyStore, home: Path) -> None:
    commit(store)

    assert kept(store) == [0.5, 0.0, -0.25]
    assert [path.name for path in home.glob("residual*")] == [residual_file(home).name]
    assert residual_file(home).stat().st_mode & 0o777 == 0o600


def test_a_residual_is_under_the_passphrase(home: Path) -> None:
    with KeyStore(home, passphrase_coding("secret")) as store:
        commit(store)
        assert LEFT["w"].tobytes() not in residual_file(home).read_bytes()
        assert kept(store) == [0.5, 0.0, -0.25]


@pytest.mark.parametrize(
    ("accepted", "wanted"), [(["two"], [1.0, 1.0, 1.0]), ([], LEFT["w"].tolist())]
)
def test_a_crash_before_the_receipt_is_settled_by_the_coordinator(
    store: KeyStore, home: Path, accepted: list[str], wanted: list[float]
) -> None:
    commit(store)
    feedback(store).stage(SESSION, "two", {"w": np.ones(3, np.float32)})

    assert kept(store, *accepted) == wanted
    assert not residual_file(home, ".pending").exists()


def test_a_residual_stays_in_doubt_while_the_coordinator_is_away(
    store: KeyStore, home: Path
) -> None:
    def ask(_: str) -> bool:
        raise UnavailableError("away")

    commit(store)
    feedback(store).stage(SESSION, "two", LEFT)

    with pytest.raises(UnavailableError):
        ErrorFeedback(store, ask).residual(SESSION, BASE)
    assert residual_file(home, ".pending").exists()


def test_a_process_that_goes_on_settles_as_well(store: KeyStore) -> None:
    made = feedback(store, "two")
    made.stage(SESSION, "one", LEFT)
    made.commit(SESSION, LEFT)
    made.stage(SESSION, "two", {"w": np.ones(3, np.float32)})

    assert made.residual(SESSION, BASE)["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("place", [0, 10, -40, -1])
def test_a_damaged_residual_is_dropped_with_a_warning(
    store: KeyStore, home: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store)
    data = bytearray(residual_file(home).read_bytes())
    data[place] ^= 1
    residual_file(home).write_bytes(data)

    with caplog.at_level(logging.WARNING, LOG):
        assert kept(store) == []
    assert "damaged" in caplog.text


@pytest.mark.parametrize("size", [0, 3, 40])
def test_a_cut_residual_is_dropped(store: KeyStore, home: Path, size: int) -> None:
    commit(store)
    residual_file(home).write_bytes(residual_file(home).read_bytes()[:size])

    assert kept(store) == []


def test_a_damaged_residual_in_doubt_is_dropped(store: KeyStore, home: Path) -> None:
    commit(store)
    feedback(store).stage(SESSION, "two", LEFT)
    residual_file(home, ".pending").write_bytes(b"damaged")

    assert kept(store, "two") == [0.5, 0.0, -0.25]


def test_a_residual_that_others_can_read_is_dropped_with_a_warning(
    store: KeyStore, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store)
    residual_file(home).chmod(0o644)

    with caplog.at_level(logging.WARNING, LOG):
        assert kept(store) == []
    assert "cannot be read" in caplog.text


def test_a_residual_of_another_layout_is_dropped_with_a_warning(
    store: KeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store)
    other = Manifest.from_arrays({"w": np.zeros(4, np.float32)})

    with caplog.at_level(logging.WARNING, LOG):
        assert feedback(store).residual(SESSION, other) == {}
    assert "another layout" in caplog.text


def test_a_residual_of_another_session_is_not_taken(store: KeyStore, home: Path) -> None:
    commit(store)
    other = hashlib.sha256(b"other").hexdigest()[:32]
    residual_file(home).rename(home / f"residual-{other}")

    assert feedback(store).residual("other", BASE) == {}


def test_what_is_kept_of_a_session_that_has_ended_is_deleted(store: KeyStore, home: Path) -> None:
    commit(store)
    made = feedback(store)
    made.stage(SESSION, "two", LEFT)

    made.forget(SESSION)

    assert not list(home.glob("residual*"))
    assert made.residual(SESSION, BASE) == {}


def test_a_residual_that_was_not_staged_cannot_count(store: KeyStore) -> None:
    with pytest.raises(KeyStoreError):
        feedback(store).commit(SESSION, LEFT)
