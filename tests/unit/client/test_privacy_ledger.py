from dataclasses import replace
from math import inf, sqrt
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.v1 import training_pb2
from qflare_client.errors import KeyStoreError, PrivacyBudgetExceededError, RepeatedTaskError
from qflare_client.keystore.store import KeyStore
from qflare_client.models.privacy_ledger import PrivacyLedger
from qflare_client.privacy import LocalPrivacy, gaussian_delta, gaussian_epsilon
from qflare_client.tasks import Task, TaskKind, TrainingTask

NOISY = LocalPrivacy(1.0, 2.0)


def task(round_number: int = 1, session_id: str = "s", nonce: str = "n") -> Task:
    return Task(
        kind=TaskKind.TRAIN,
        poll_delay_s=1.0,
        training_session_id=session_id,
        round_number=round_number,
        base_version=0,
        base_digest="",
        deadline=None,
        config=TrainingTask(session_id, round_number, 0, 1, 32, 0.1),
        transfer=training_pb2.TransferPolicy(),
        nonce=nonce,
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_round_is_released_once_and_rounds_ascend(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, int]]
) -> None:
    home = tmp_path_factory.mktemp("device")
    last: dict[str, int] = {}
    released = 0
    for session_id, number in wanted:
        with KeyStore(home) as store:  # a restart before each
            ledger = PrivacyLedger(store)
            if number > last.get(session_id, 0):
                ledger.record(task(number, session_id), NOISY)
                last[session_id] = number
                released += 1
            else:
                with pytest.raises(RepeatedTaskError):
                    ledger.record(task(number, session_id), NOISY)
            assert ledger.epsilon(1e-5) == gaussian_epsilon(sqrt(released), 1e-5)


def test_another_nonce_for_the_same_round_is_refused(tmp_path: Path) -> None:
    with KeyStore(tmp_path) as store:
        ledger = PrivacyLedger(store)
        ledger.record(task(nonce="first"), NOISY)

        with pytest.raises(RepeatedTaskError):
            ledger.require(task(nonce="second"), NOISY)


def test_a_budget_holds_at_its_edge(tmp_path: Path) -> None:
    budget = gaussian_epsilon(sqrt(4.0), 1e-6)
    privacy = replace(NOISY, max_epsilon=budget, delta=1e-6)
    with KeyStore(tmp_path) as store:
        ledger = PrivacyLedger(store)
        for number in range(1, 5):
            ledger.record(task(number), privacy)

        with pytest.raises(PrivacyBudgetExceededError):
            ledger.record(task(5), privacy)
        assert ledger.epsilon(1e-6) == budget


def test_a_release_without_noise_is_infinite(tmp_path: Path) -> None:
    with KeyStore(tmp_path) as store:
        PrivacyLedger(store).record(task(), LocalPrivacy(1.0))

        assert PrivacyLedger(store).epsilon(1e-5) == inf


@pytest.mark.parametrize("text", ['{"rounds": 7}', '{"spent": "much"}', '{"release_count": null}'])
def test_a_damaged_ledger_is_not_started_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "privacy.json").write_text(text)

    with KeyStore(tmp_path) as store, pytest.raises(KeyStoreError, match="damaged"):
        PrivacyLedger(store)


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_epsilon_is_the_smallest_at_its_delta(ratio: float, delta: float) -> None:
    epsilon = gaussian_epsilon(ratio, delta)

    assert gaussian_delta(epsilon, ratio, 1.0) <= delta
    if epsilon:
        assert gaussian_delta(epsilon * 0.9999, ratio, 1.0) > delta


def test_no_release_costs_nothing() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


def test_far_too_little_noise_is_infinite() -> None:
    assert gaussian_epsilon(1000.0, 1e-5) == inf


@pytest.mark.parametrize(
    "changes",
    [
        {"max_epsilon": 0.0},
        {"max_epsilon": float("nan")},
        {"max_epsilon": 701.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"noise_multiplier": 0.0, "max_epsilon": 1.0},
    ],
)
def test_a_budget_that_holds_nothing_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs noise"):
        LocalPrivacy(**{"clip_norm": 1.0, "noise_multiplier": 1.0, **changes})
