"""Noise of devices and helpers: its samples, the room for it in the ring, its accounting, and what is refused."""

import json
from math import pi, sqrt
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qflare.evidence.statements import StatementError
from qflare.evidence.unmasking import check_answer, masking_of
from qflare.masking.noise import DEVICES, HELPER, SumNoise, add_to, draw_exact, fits
from qflare.masking.parameters import MaskingParameters
from qflare.v1 import security_pb2, verification_pb2
from qflare_client import InvalidArgumentError, SecureAggregation
from qflare_helper.errors import PolicyError
from qflare_helper.ledger import AnsweredSet, Ledger, LedgerMember
from qflare_helper.policy import FILE, read_policy, write_policy
from qflare_server.strategies.accounting import (
    PrivacyLedger,
    discrete_multiplier,
    spent,
    with_version,
)
from qflare_server.strategies.config import NoiseShares, PrivacyConfig
from tests.vectors.protocol.generate import FOLDER

Transcript = verification_pb2.UnmaskingTranscript
NOISE = 2.0


def density(stddev: float, reach: int) -> NDArray[np.float64]:
    """Probabilities of the discrete Gaussian distribution from -reach to reach."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / stddev) ** 2)
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("stddev", [0.7, 3.0])
def test_samples_have_the_distribution(stddev: float) -> None:
    """Each count is within six standard deviations of what the definition says."""
    count, reach = 20_000, 12
    samples = draw_exact(count, stddev)
    assert samples.shape == (count,)
    assert np.abs(samples).max() <= reach * 2
    for value, probability in zip(range(-reach, reach + 1), density(stddev, reach), strict=True):
        expected = count * probability
        assert abs((samples == value).sum() - expected) <= 6 * sqrt(expected) + 6


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8"])
def test_noise_is_added_modulo_the_ring(dtype: str) -> None:
    levels = np.array([0, 5, np.iinfo(dtype).max] * 9000, dtype)
    drawn = np.arange(-13_500, 13_500)
    rest = iter(np.split(drawn, range(2**13, len(drawn), 2**13)))
    added = levels.copy()
    add_to(added, 1.0, lambda *_: next(rest))
    modulus = 1 << 8 * levels.itemsize
    wanted = [(int(a) + int(b)) % modulus for a, b in zip(levels, drawn, strict=True)]
    assert added.tolist() == wanted


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    "noise", [SumNoise(DEVICES, 1.5, 7, 0), SumNoise(HELPER, 0.3, 2, 3), SumNoise(DEVICES, 9, 2, 1)]
)
def test_the_largest_sum_with_its_noise_stays_in_the_ring(bits: int, noise: SumNoise) -> None:
    """10.6 deviations of the noise of the largest allowed model, above the largest sum of updates."""
    cohort = 20
    made = MaskingParameters(bits, 3.0, cohort, 1, {}, noise)
    count = int((made.clip_levels / 2) ** 2)
    assert fits(made.clip_levels, min(count, 2**40)) or bits == 64
    shares = cohort if noise.source == DEVICES else noise.helper_count
    deviation = made.noise_stddev(min(count, 2**40)) * sqrt(shares)
    assert cohort * made.limit + 10.6 * deviation <= 2 ** (bits - 1)
    assert made.scale * 3 <= made.limit
    without = MaskingParameters(bits, 3.0, cohort, 1, {})
    assert made.scale < without.scale
    assert made.slot_count == without.slot_count
    assert noise.room(cohort) ** 2 >= (16 * noise.multiplier) ** 2 * (
        cohort / noise.min_cohort if noise.source == DEVICES else noise.helper_count
    )


def test_the_shares_of_the_smallest_cohort_are_the_noise() -> None:
    noise = SumNoise(DEVICES, NOISE, 5, 0)
    made = MaskingParameters(32, 1.0, 100, 1, {}, noise)
    whole = NOISE * (made.clip_levels + sqrt(400))
    assert made.noise_stddev(400) * sqrt(5) == pytest.approx(whole, rel=1e-11)
    assert made.noise_stddev(400) * sqrt(5) >= whole


def renyi(stddev: float, count: int, shift: int, order: float) -> float:
    """Renyi divergence of a sum of discrete Gaussian shares from the same sum, shifted; from its probabilities."""
    reach = 80
    total = share = density(stddev, reach)
    for _ in range(count - 1):
        total = np.convolve(total, share)
    first, second = total[shift:], total[: len(total) - shift]
    usable = (first > 1e-280) & (second > 1e-280)
    powers = order * np.log(first[usable]) + (1 - order) * np.log(second[usable])
    return float(np.log(np.exp(powers).sum()) / (order - 1))


@pytest.mark.parametrize(("stddev", "count"), [(0.5, 2), (0.6, 5), (1.0, 4), (3.0, 10), (2.0, 1)])
@pytest.mark.parametrize("order", [1.5, 4.0, 16.0])
def test_the_bound_of_shares_holds_for_their_exact_divergence(
    stddev: float, count: int, order: float
) -> None:
    """And it is close where the shares are not tiny."""
    shift = 1
    multiplier = sqrt(count) * stddev / shift
    made = discrete_multiplier(multiplier, NoiseShares(count, stddev, 1))
    bound = order / (2 * made**2)
    exact = renyi(stddev, count, shift, order)
    assert exact <= bound * (1 + 1e-9)
    if stddev >= 1:
        assert exact >= 0.99 * bound


def test_the_bound_by_the_published_formula() -> None:
    stddev, count, elements = 0.8, 30, 10**6
    tau = 10 * sum(
        2.718281828459045 ** (-2 * pi**2 * stddev**2 * k / (k + 1)) for k in range(1, count)
    )
    epsilon = 1 / NOISE + tau * elements**0.5
    made = discrete_multiplier(NOISE, NoiseShares(count, stddev, elements))
    assert made == pytest.approx(1 / epsilon, rel=1e-9)
    with pytest.raises(ValueError, match=r"want 0\.5 or more"):
        discrete_multiplier(NOISE, NoiseShares(2, 0.49, 1))


def test_shares_that_are_allowed_cost_what_their_sum_costs() -> None:
    """With the least share of four levels, neither a million devices nor the largest model cost a bit more."""
    assert discrete_multiplier(NOISE, NoiseShares(10**6, 4.0, 2**40)) == NOISE
    shares = NoiseShares(5, 0.5, 10**4)
    config = PrivacyConfig(1.0, NOISE, 100.0, 1e-5, shares=shares)
    ledger = with_version(config, PrivacyLedger())
    (run,) = ledger.runs
    assert run.noise_multiplier == discrete_multiplier(NOISE, shares) < NOISE
    plain = PrivacyLedger().with_release(NOISE, 1.0)
    assert spent(ledger, 1e-5).epsilon > spent(plain, 1e-5).epsilon


def test_a_kept_update_without_the_noise_does_not_leave_the_device() -> None:
    policy = SecureAggregation(2, {"a" * 64}, noise_multiplier=NOISE)
    statement = security_pb2.UpdateStatement()
    statement.masking.seeds.add(helper_id="a" * 64)
    assert not policy.allows_kept(statement)
    statement.masking.noise_multiplier = NOISE
    assert policy.allows_kept(statement)


def test_the_noise_of_a_set_goes_with_an_answer_for_a_later_round(tmp_path: Path) -> None:
    ledger, chunks = Ledger(tmp_path), [b"first chunk", b"rest"]

    def record(session_id: str, number: int, noise: list[bytes]) -> AnsweredSet:
        answered = AnsweredSet(session_id, number, "task", f"set {number}")
        name = f"{session_id} {number}"
        member = LedgerMember(name, "device", name.encode())
        sign = lambda counter, _: security_pb2.SignedEnvelope(payload=bytes([counter]))  # noqa: E731
        ledger.record(answered, [member], sign, noise)
        return answered

    first, other = record("a", 1, chunks), record("b", 1, chunks)
    assert [ledger.noise(first, index) for index in range(3)] == [*chunks, None]
    assert record("a", 1, [b"another"]) == first
    assert ledger.noise(first, 0) == chunks[0]
    second = record("a", 2, chunks)
    assert ledger.noise(first, 0) is None
    assert ledger.noise(second, 1) == ledger.noise(other, 1) == chunks[1]


def test_no_answer_with_other_noise_is_used() -> None:
    """The statement of a helper that left the noise out, or added other noise, is not the one of the task."""
    vectors = json.loads((FOLDER / "noise.json").read_text(encoding="utf-8"))["helper"]
    transcript = Transcript.FromString(bytes.fromhex(vectors["transcript"]))
    masking = masking_of(transcript.task)
    assert masking is not None
    answer = security_pb2.UnmaskingAnswer.FromString(transcript.answers[0].payload)
    stated = {field.name for field in security_pb2.UnmaskingRequest.DESCRIPTOR.fields}
    request = security_pb2.UnmaskingRequest(
        **{field.name: value for field, value in answer.ListFields() if field.name in stated}
    )
    check_answer(answer, request, masking, answer.size_bytes)
    for multiplier in (0.0, 1.0):
        answer.noise_multiplier = multiplier
        with pytest.raises(StatementError, match="noise_multiplier"):
            check_answer(answer, request, masking, answer.size_bytes)


@pytest.mark.parametrize("entry", ["-1", "true", '"much"', "nan", "inf", "1e7"])
def test_a_policy_with_another_noise_than_a_number_is_refused(entry: str, tmp_path: Path) -> None:
    write_policy(tmp_path, 3)
    assert read_policy(tmp_path).noise_multiplier == 0
    (tmp_path / FILE).write_text(f"min_cohort = 3\nnoise_multiplier = {entry}\n")
    with pytest.raises(PolicyError, match="noise_multiplier"):
        read_policy(tmp_path)
    own = tmp_path / "device.toml"
    own.write_text(f'min_cohort = 3\nhelper_key_ids = ["{"a" * 64}"]\nnoise_multiplier = {entry}\n')
    with pytest.raises(InvalidArgumentError, match="noise_multiplier"):
        SecureAggregation.from_file(own)
