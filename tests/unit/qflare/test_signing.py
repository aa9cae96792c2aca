"""Signatures: what verifies, what is refused, and that the providers agree with the standard."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from hypothesis import given, settings
from hypothesis import strategies as st
from pqcrypto.sign import ml_dsa_65

from qflare.crypto import signature_libraries
from qflare.crypto.signature_libraries import LIBRARIES, SIZES, Library, library_for
from qflare.crypto.signing import (
    DEFAULT_PROVIDER,
    MAX_MESSAGE_BYTES,
    ONLINE_ALGORITHMS,
    Algorithm,
    CryptoUnavailableError,
    InvalidKeyError,
    InvalidSignatureError,
    Provider,
    PublicKey,
    SigningContext,
    SigningError,
    SigningKey,
    algorithm_named,
    algorithm_names,
    key_id_of,
    self_test,
    tagged_hash,
)
from qflare.v1 import security_pb2

VECTORS = Path(__file__).parents[2] / "vectors"
KEY = SigningKey.generate(provider=Provider.CRYPTOGRAPHY)
SIGNATURE = KEY.sign(SigningContext.UPDATE, b"message")

every_provider = pytest.mark.parametrize("provider", Provider)
every_algorithm = pytest.mark.parametrize("algorithm", sorted(ONLINE_ALGORITHMS))


def test_both_providers_are_here() -> None:
    assert set(LIBRARIES) == set(Provider)
    assert DEFAULT_PROVIDER is Provider.CRYPTOGRAPHY


@every_algorithm
@pytest.mark.parametrize("verifier", Provider)
@pytest.mark.parametrize("signer", Provider)
def test_each_provider_accepts_what_the_other_signs(
    signer: Provider, verifier: Provider, algorithm: Algorithm
) -> None:
    key = SigningKey.generate(algorithm, provider=signer)

    signature = key.sign(SigningContext.MODEL, b"message")

    assert len(signature) == SIZES[algorithm].signature_bytes
    key.public.verify(SigningContext.MODEL, b"message", signature, provider=verifier)


@every_algorithm
@every_provider
def test_a_stored_key_signs_for_the_same_public_key(
    provider: Provider, algorithm: Algorithm
) -> None:
    key = SigningKey.generate(algorithm, provider=provider)

    loaded = SigningKey.from_bytes(key.to_bytes())

    assert loaded.provider is provider
    key.public.verify(SigningContext.TASK, b"message", loaded.sign(SigningContext.TASK, b"message"))


def test_two_signatures_of_one_message_differ() -> None:
    assert KEY.sign(SigningContext.UPDATE, b"message") != SIGNATURE


@every_provider
def test_another_context_is_refused(provider: Provider) -> None:
    for context in set(SigningContext) - {SigningContext.UPDATE}:
        with pytest.raises(InvalidSignatureError):
            KEY.public.verify(context, b"message", SIGNATURE, provider=provider)


@every_provider
def test_another_message_is_refused(provider: Provider) -> None:
    with pytest.raises(InvalidSignatureError):
        KEY.public.verify(SigningContext.UPDATE, b"massage", SIGNATURE, provider=provider)


@every_provider
def test_another_key_is_refused(provider: Provider) -> None:
    other = SigningKey.generate()

    with pytest.raises(InvalidSignatureError):
        other.public.verify(SigningContext.UPDATE, b"message", SIGNATURE, provider=provider)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(SIGNATURE) * 8 - 1), st.sampled_from(Provider))
def test_a_flipped_bit_is_refused(bit: int, provider: Provider) -> None:
    flipped = bytearray(SIGNATURE)
    flipped[bit // 8] ^= 1 << bit % 8

    with pytest.raises(InvalidSignatureError):
        KEY.public.verify(SigningContext.UPDATE, b"message", bytes(flipped), provider=provider)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.binary(max_size=4000), st.integers(0, 3308).map(lambda n: SIGNATURE[:n])))
def test_a_truncated_or_invented_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(InvalidSignatureError):
        KEY.public.verify(SigningContext.UPDATE, b"message", signature)


def test_a_lengthened_signature_is_refused() -> None:
    with pytest.raises(InvalidSignatureError):
        KEY.public.verify(SigningContext.UPDATE, b"message", SIGNATURE + b"\x00")


@every_provider
def test_both_halves_of_a_hybrid_signature_have_to_verify(provider: Provider) -> None:
    key = SigningKey.generate(Algorithm.ML_DSA_65_ED25519, provider=provider)
    signature = key.sign(SigningContext.UPDATE, b"message")
    split = SIZES[Algorithm.ML_DSA_65].signature_bytes

    for place in (0, split - 1, split, len(signature) - 1):
        broken = bytearray(signature)
        broken[place] ^= 1
        with pytest.raises(InvalidSignatureError):
            key.public.verify(SigningContext.UPDATE, b"message", bytes(broken))


def test_half_of_a_hybrid_signature_is_no_signature_of_its_own() -> None:
    key = SigningKey.generate(Algorithm.ML_DSA_65_ED25519)
    half = key.sign(SigningContext.UPDATE, b"message")[: SIZES[Algorithm.ML_DSA_65].signature_bytes]
    lattice = PublicKey(Algorithm.ML_DSA_65, key.public.data[:1952])

    with pytest.raises(InvalidSignatureError):
        lattice.verify(SigningContext.UPDATE, b"message", half)


@every_provider
def test_the_longest_message_is_signed_and_no_longer_one(provider: Provider) -> None:
    key = SigningKey.generate(provider=provider)
    longest = b"x" * MAX_MESSAGE_BYTES

    signature = key.sign(SigningContext.UPDATE, longest)

    key.public.verify(SigningContext.UPDATE, longest, signature)
    with pytest.raises(ValueError, match="want <= 65536"):
        key.sign(SigningContext.UPDATE, longest + b"x")
    with pytest.raises(InvalidSignatureError):
        key.public.verify(SigningContext.UPDATE, longest + b"x", signature)


def test_key_id_binds_the_algorithm() -> None:
    data = KEY.public.data

    assert KEY.public.key_id == key_id_of(2, data)
    assert key_id_of(2, data) != key_id_of(3, data)
    assert len(KEY.public.key_id) == 64


def test_tagged_hash_keeps_its_parts_apart() -> None:
    assert tagged_hash("t", b"ab", b"c") != tagged_hash("t", b"a", b"bc")
    assert tagged_hash("t", b"") != tagged_hash("t")


def test_a_public_key_survives_its_message() -> None:
    assert PublicKey.from_proto(KEY.public.to_proto()) == KEY.public


@pytest.mark.parametrize(
    "change",
    [{"key_id": "00" * 32}, {"algorithm": 0}, {"algorithm": 99}, {"algorithm": 1}, {"data": b"x"}],
)
def test_a_public_key_message_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    message = KEY.public.to_proto()
    message.MergeFrom(security_pb2.PublicKey(**change))
    if change.get("algorithm") == 0:
        message.algorithm = security_pb2.SIGNATURE_ALGORITHM_UNSPECIFIED

    with pytest.raises(InvalidKeyError):
        PublicKey.from_proto(message)


def test_an_all_zero_public_key_verifies_nothing() -> None:
    with pytest.raises(InvalidSignatureError):
        PublicKey(Algorithm.ML_DSA_65, bytes(1952)).verify(
            SigningContext.UPDATE, b"message", SIGNATURE
        )


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda b: b"QFSK\x01" + b)))
def test_bytes_that_are_no_key_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidKeyError):
        SigningKey.from_bytes(data)


@every_provider
def test_a_damaged_key_fails_its_self_test(provider: Provider) -> None:
    stored = SigningKey.generate(provider=provider).to_bytes()
    for place in (0, 5, 7, 8, 9, 9 + 1952):
        damaged = bytearray(stored)
        damaged[place] ^= 1
        with pytest.raises(InvalidKeyError):
            SigningKey.from_bytes(bytes(damaged))
    with pytest.raises(InvalidKeyError):
        SigningKey.from_bytes(stored[:-1])


def test_the_secret_of_another_key_fails_the_self_test() -> None:
    mine, other = KEY.to_bytes(), SigningKey.generate(provider=Provider.CRYPTOGRAPHY).to_bytes()

    with pytest.raises(InvalidKeyError):
        SigningKey.from_bytes(mine[:-32] + other[-32:])


def test_a_key_shows_no_secret() -> None:
    secret = KEY.to_bytes()[-32:]

    assert secret.hex() not in repr(KEY)
    assert repr(secret)[2:-1] not in repr(KEY)
    assert "data" not in {f.name for f in dataclasses.fields(KEY.public) if f.repr}


def test_the_self_test_passes() -> None:
    self_test()


class Unlucky:
    """ML-DSA of pqcrypto whose bounded rejection loop gives up a number of times."""

    def __init__(self, failures: int) -> None:
        self._failures = failures

    def sign(self, *arguments: bytes) -> bytes:
        self._failures -= 1
        if self._failures >= 0:
            raise ValueError("signing failed")
        return bytes(ml_dsa_65.sign(*arguments))


@pytest.mark.parametrize(("failures", "error"), [(1, None), (2, SigningError)])
def test_signing_is_tried_twice(
    failures: int, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = SigningKey.generate(provider=Provider.PQCRYPTO)
    library = LIBRARIES[Provider.PQCRYPTO]
    monkeypatch.setattr(library, "_modules", {Algorithm.ML_DSA_65: Unlucky(failures)})
    sign = library.signer(Algorithm.ML_DSA_65, key.to_bytes()[9 + 1952 :])
    monkeypatch.setattr(key, "_sign", sign)

    if error is None:
        key.public.verify(
            SigningContext.UPDATE, b"message", key.sign(SigningContext.UPDATE, b"message")
        )
        return
    with pytest.raises(error):
        key.sign(SigningContext.UPDATE, b"message")


def test_a_provider_that_is_not_there_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LIBRARIES, Provider.PQCRYPTO)

    with pytest.raises(CryptoUnavailableError):
        SigningKey.generate(provider=Provider.PQCRYPTO)
    with pytest.raises(CryptoUnavailableError):
        library_for(Provider.PQCRYPTO, Algorithm.ML_DSA_87)


def refuse(error: Exception) -> Callable[[], Library]:
    def build() -> Library:
        raise error

    return build


def test_one_provider_is_enough_and_none_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        signature_libraries, "_Cryptography", refuse(UnsupportedAlgorithm("no ML-DSA"))
    )
    assert list(signature_libraries._load_libraries()) == [Provider.PQCRYPTO]

    monkeypatch.setattr(signature_libraries, "_Pqcrypto", refuse(ImportError("no wheel")))
    with pytest.raises(CryptoUnavailableError):
        signature_libraries._load_libraries()


def test_a_provider_that_does_not_verify_fails_the_self_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a broken build would do: a signature of the right length that means nothing.
    class Broken:
        def __init__(self, sound: Library) -> None:
            self.generate, self.verifier = sound.generate, sound.verifier

        def signer(self, algorithm: Algorithm, _secret: bytes) -> Any:
            return lambda _message, _context: bytes(SIZES[algorithm].signature_bytes)

    monkeypatch.setitem(LIBRARIES, Provider.PQCRYPTO, Broken(LIBRARIES[Provider.PQCRYPTO]))

    with pytest.raises(CryptoUnavailableError):
        self_test()


def vector_cases(name: str) -> list[Any]:
    groups = json.loads((VECTORS / name).read_text())["testGroups"]
    return [
        pytest.param(group, test, id=f"{name.partition('_')[0]}-{test['tcId']}")
        for group in groups
        for test in group["tests"]
    ]


@every_provider
@pytest.mark.parametrize(
    ("group", "test"),
    [case for n in (44, 65, 87) for case in vector_cases(f"mldsa{n}_verify.json")],
)
def test_wycheproof_verify(
    provider: Provider, group: dict[str, Any], test: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    algorithm = Algorithm[f"ML_DSA_{request.node.callspec.id.split('mldsa')[1][:2]}"]
    context = bytes.fromhex(test.get("ctx", ""))
    expected = test["result"] == "valid" and not beyond_pqcrypto(provider, context)

    assert vector_verifies(provider, algorithm, group, test) is expected


def beyond_pqcrypto(provider: Provider, context: bytes) -> bool:
    """pqcrypto 1.0 refuses contexts above 253 bytes; FIPS 204 allows 255. Ours are far shorter."""
    return provider is Provider.PQCRYPTO and len(context) > 253


def vector_verifies(
    provider: Provider, algorithm: Algorithm, group: dict[str, Any], test: dict[str, Any]
) -> bool:
    public, signature = bytes.fromhex(group["publicKey"]), bytes.fromhex(test["sig"])
    message, context = bytes.fromhex(test.get("msg", "")), bytes.fromhex(test.get("ctx", ""))
    try:
        PublicKey(algorithm, public)
        library_for(provider, algorithm).verifier(algorithm, public)(signature, message, context)
    except (ValueError, InvalidSignature):
        return False
    return True


SLH_DSA = json.loads((VECTORS / "slhdsa_sha2_128s.json").read_text())


@pytest.mark.parametrize("test", SLH_DSA["verify"], ids=lambda test: test["tcId"])
def test_acvp_slh_dsa_verify(test: dict[str, Any]) -> None:
    expected = test["result"] == "valid"

    assert vector_verifies(Provider.PQCRYPTO, Algorithm.SLH_DSA_SHA2_128S, test, test) is expected


@pytest.mark.parametrize("test", SLH_DSA["sign"], ids=lambda test: test["tcId"])
def test_acvp_slh_dsa_sign(test: dict[str, Any]) -> None:
    public = bytes.fromhex(test["sk"])[32:]
    stored = b"QFSK\x01\x00\x05\x02\x02" + public + bytes.fromhex(test["sk"])

    key = SigningKey.from_bytes(
        stored
    )  # it signs with the private half and verifies with the public one

    assert key.public == PublicKey(Algorithm.SLH_DSA_SHA2_128S, public)
    group = {"publicKey": public.hex()}
    assert vector_verifies(Provider.PQCRYPTO, Algorithm.SLH_DSA_SHA2_128S, group, test)


def test_slh_dsa_is_of_one_provider_and_not_of_online_keys() -> None:
    assert Algorithm.SLH_DSA_SHA2_128S not in ONLINE_ALGORITHMS
    with pytest.raises(CryptoUnavailableError):
        SigningKey.generate(Algorithm.SLH_DSA_SHA2_128S, provider=Provider.CRYPTOGRAPHY)


def test_slh_dsa_of_another_provider_is_refused_on_load() -> None:
    with pytest.raises(CryptoUnavailableError):
        SigningKey.from_bytes(b"QFSK\x01\x00\x05\x01\x01" + bytes(32 + 64))


def test_a_flipped_bit_of_an_slh_dsa_signature_is_refused() -> None:
    key = SigningKey.generate(Algorithm.SLH_DSA_SHA2_128S)
    signature = bytearray(key.sign(SigningContext.ROOT, b"message"))
    signature[4000] ^= 1

    with pytest.raises(InvalidSignatureError):
        key.public.verify(SigningContext.ROOT, b"message", bytes(signature))


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_algorithms_have_names(algorithm: Algorithm) -> None:
    (name,) = algorithm_names([algorithm])

    assert algorithm_named(name) is algorithm


@pytest.mark.parametrize("name", ["", "ML-DSA-65", "ml_dsa_65", "rsa", "ml-dsa-65 "])
def test_a_name_of_no_algorithm_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InvalidKeyError, match="slh-dsa-sha2-128s"):
        algorithm_named(name)


@every_provider
@pytest.mark.parametrize(("group", "test"), vector_cases("mldsa65_sign_seed.json"))
def test_wycheproof_key_from_seed(
    provider: Provider, group: dict[str, Any], test: dict[str, Any]
) -> None:
    public = PublicKey(Algorithm.ML_DSA_65, bytes.fromhex(group["publicKey"]))
    stored = b"QFSK\x01\x00\x02\x01\x01" + public.data + bytes.fromhex(group["privateSeed"])

    key = SigningKey.from_bytes(stored)

    expected = not beyond_pqcrypto(provider, bytes.fromhex(test.get("ctx", "")))
    assert key.public == public
    assert vector_verifies(provider, Algorithm.ML_DSA_65, group, test) is expected
