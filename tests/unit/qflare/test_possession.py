"""Refreshes and proofs of possession: what another key, token, method or message does to them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflare.protocol.handshake import HandshakeError
from qflare.protocol.possession import CallProver, Refresh, check_call
from qflare.v1 import security_pb2

KEY = bytes(range(32))
METHOD = "/qflare.v1.CoordinatorService/GetTask"
GRANT = security_pb2.TokenGrant(access_token="access", refresh_token="next")


def test_a_refresh_is_answered() -> None:
    asked = Refresh.start(KEY, "session", "refresh")

    sealed = Refresh.check(KEY, asked.request).seal_grant(GRANT)

    assert asked.open_grant(sealed) == GRANT
    assert b"next" not in sealed.SerializeToString()


def test_a_refresh_with_another_key_is_refused() -> None:
    asked = Refresh.start(bytes(32), "session", "refresh")

    with pytest.raises(HandshakeError):
        Refresh.check(KEY, asked.request)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("session_id", "other"),
        ("refresh_token", "other"),
        ("nonce", bytes(32)),
        ("nonce", b""),
        ("proof", bytes(32)),
        ("proof", b""),
    ],
)
def test_a_changed_refresh_is_refused(name: str, value: object) -> None:
    asked = Refresh.start(KEY, "session", "refresh")
    setattr(asked.request, name, value)

    with pytest.raises(HandshakeError):
        Refresh.check(KEY, asked.request)


def test_the_answer_to_another_refresh_is_refused() -> None:
    asked = Refresh.start(KEY, "session", "refresh")
    other = Refresh.start(KEY, "session", "refresh")

    with pytest.raises(HandshakeError):
        asked.open_grant(other.seal_grant(GRANT))


def test_a_refresh_shows_no_token() -> None:
    assert repr(Refresh.start(KEY, "session", "secret")) == "Refresh()"


def test_calls_are_proven_in_order() -> None:
    prover = CallProver(KEY, "token", first_sequence=7)

    proofs = [prover.prove(METHOD, b"message") for _ in range(3)]

    assert [check_call(KEY, "token", METHOD, b"message", proof) for proof in proofs] == [7, 8, 9]
    assert {len(proof) for proof in proofs} == {40}


@pytest.mark.parametrize(
    ("key", "token", "method", "message"),
    [
        (bytes(32), "token", METHOD, b"message"),
        (KEY, "other", METHOD, b"message"),
        (KEY, "token", METHOD + "s", b"message"),
        (KEY, "token", METHOD, b"massage"),
    ],
)
def test_a_proof_for_another_call_is_refused(
    key: bytes, token: str, method: str, message: bytes
) -> None:
    proof = CallProver(KEY, "token").prove(METHOD, b"message")

    with pytest.raises(HandshakeError):
        check_call(key, token, method, message, proof)


@given(st.integers(0, 319))
def test_a_flipped_bit_is_refused(bit: int) -> None:
    proof = bytearray(CallProver(KEY, "token").prove(METHOD, b"message"))
    proof[bit // 8] ^= 1 << bit % 8

    with pytest.raises(HandshakeError):
        check_call(KEY, "token", METHOD, b"message", bytes(proof))


@given(st.binary(max_size=60))
def test_an_invented_proof_is_refused(proof: bytes) -> None:
    with pytest.raises(HandshakeError):
        check_call(KEY, "token", METHOD, b"message", proof)


def test_many_threads_use_each_number_once() -> None:
    prover = CallProver(KEY, "token")

    with ThreadPoolExecutor(4) as pool:
        proofs = list(pool.map(lambda _: prover.prove(METHOD, b""), range(400)))
        numbers = [check_call(KEY, "token", METHOD, b"", proof) for proof in proofs]

    assert sorted(numbers) == list(range(400))
