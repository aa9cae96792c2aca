"""Login: both sides derive the same keys, and every message that was tampered with is refused."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey
from qflare.crypto.symmetric import UnsealError
from qflare.protocol.handshake import HandshakeError, open_state, seal_state
from qflare.protocol.login import DeviceLogin, LoginServer, SessionKeys
from qflare.v1 import security_pb2

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REALM = "realm"
GROUP = "X25519MLKEM768"
STATE_KEY = bytes(range(32))
SERVER_KEY = KemKey.generate()
DEVICE_KEY = SigningKey.generate()


def decapsulate(key_id: str, encapsulation: bytes) -> bytes:
    if key_id != SERVER_KEY.public.key_id:
        raise UnsealError("no such key")
    return SERVER_KEY.decapsulate(encapsulation)


def server(realm: str = REALM, state_key: bytes = STATE_KEY) -> LoginServer:
    return LoginServer(realm=realm, state_key=state_key, decapsulate=decapsulate)


def device(
    *,
    realm: str = REALM,
    key: SigningKey = DEVICE_KEY,
    server_key: KemKey = SERVER_KEY,
    group: str | None = None,
) -> DeviceLogin:
    return DeviceLogin(
        realm=realm,
        device_id="device",
        signing_key=key,
        server_key=server_key.public,
        required_tls_group=group,
    )


def proven(
    key: SigningKey = DEVICE_KEY,
) -> tuple[LoginServer, SessionKeys, security_pb2.SessionProof]:
    coordinator, entering = server(), device(key=key)
    keys, proof = entering.prove(coordinator.challenge(entering.hello(), GROUP, NOW))
    return coordinator, keys, proof


def test_both_sides_derive_the_same_keys() -> None:
    coordinator, keys, proof = proven()

    pending = coordinator.open_proof(proof, NOW)

    assert pending.device_id == "device"
    assert pending.signature_key_id == DEVICE_KEY.public.key_id
    assert pending.verify(DEVICE_KEY.public) == keys
    assert keys.grant_key != keys.binding_key


@pytest.mark.parametrize("algorithm", Algorithm)
def test_every_algorithm_logs_in(algorithm: Algorithm) -> None:
    key = SigningKey.generate(algorithm)
    coordinator, keys, proof = proven(key)

    assert coordinator.open_proof(proof, NOW).verify(key.public) == keys


def test_the_grant_reaches_the_device() -> None:
    coordinator, keys, proof = proven()
    grant = security_pb2.TokenGrant(access_token="access", refresh_token="refresh")

    sealed = coordinator.open_proof(proof, NOW).verify(DEVICE_KEY.public).seal_grant(grant)

    assert keys.open_grant(sealed) == grant
    assert b"access" not in sealed.SerializeToString()


def test_the_grant_of_another_login_is_refused() -> None:
    _coordinator, keys, _proof = proven()
    _coordinator, others, _proof = proven()

    with pytest.raises(HandshakeError):
        keys.open_grant(others.seal_grant(security_pb2.TokenGrant()))


def test_two_logins_share_no_key() -> None:
    _coordinator, first, _proof = proven()
    _coordinator, second, _proof = proven()

    assert len({first.session_id, second.session_id}) == 2
    assert not {first.grant_key, first.binding_key} & {second.grant_key, second.binding_key}


def test_keys_show_no_secret() -> None:
    coordinator, keys, proof = proven()
    pending = coordinator.open_proof(proof, NOW)

    assert repr(keys) == f"SessionKeys(session_id={keys.session_id!r})"
    assert "prk" not in repr(pending)


def test_another_replica_finishes_a_login() -> None:
    _coordinator, keys, proof = proven()

    assert server().open_proof(proof, NOW).verify(DEVICE_KEY.public) == keys


def test_a_coordinator_without_the_key_is_found_out_before_the_device_signs() -> None:
    entering = device()
    impostor_key = KemKey.generate()
    impostor = LoginServer(
        realm=REALM,
        state_key=STATE_KEY,
        decapsulate=lambda _key_id, encapsulation: impostor_key.decapsulate(encapsulation),
    )

    with pytest.raises(HandshakeError):
        entering.prove(impostor.challenge(entering.hello(), GROUP, NOW))


def test_a_challenge_for_another_hello_is_refused() -> None:
    coordinator, entering, other = server(), device(), device()

    with pytest.raises(HandshakeError):
        entering.prove(coordinator.challenge(other.hello(), GROUP, NOW))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("protocol_version", 2),
        ("realm", "other"),
        ("device_id", ""),
        ("device_id", "x" * 256),
        ("signature_key_id", "short"),
        ("server_kem_key_id", "00" * 32),
        ("nonce", b"short"),
        ("ephemeral_key", b"short"),
        ("encapsulation", b"short"),
    ],
)
def test_a_hello_with_a_bad_field_is_refused(name: str, value: object) -> None:
    hello = device().hello()
    setattr(hello, name, value)

    with pytest.raises(HandshakeError):
        server().challenge(hello, GROUP, NOW)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_id", "other"),
        ("signature_key_id", "00" * 32),
        ("nonce", bytes(32)),
        ("ephemeral_key", KemKey.generate().public.data),
        ("encapsulation", SERVER_KEY.public.encapsulate().ciphertext),
    ],
)
def test_a_hello_changed_on_its_way_is_found_out(name: str, value: object) -> None:
    coordinator, entering = server(), device()
    hello = security_pb2.SessionHello.FromString(entering.hello().SerializeToString())
    setattr(hello, name, value)

    with pytest.raises(HandshakeError):
        entering.prove(coordinator.challenge(hello, GROUP, NOW))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonce", bytes(32)),
        ("session_id", "00" * 16),
        ("encapsulation", bytes(1120)),
        ("encapsulation", b"short"),
        ("tls_group", "secp256r1"),
        ("confirmation", bytes(32)),
        ("confirmation", b""),
    ],
)
def test_a_challenge_changed_on_its_way_is_found_out(name: str, value: object) -> None:
    coordinator, entering = server(), device()
    challenge = coordinator.challenge(entering.hello(), GROUP, NOW)
    setattr(challenge, name, value)

    with pytest.raises(HandshakeError):
        entering.prove(challenge)


@pytest.mark.parametrize("reported", ["", "x25519", "secp256r1"])
def test_a_downgraded_tls_group_is_refused(reported: str) -> None:
    coordinator, entering = server(), device(group=GROUP)

    with pytest.raises(HandshakeError, match="TLS group"):
        entering.prove(coordinator.challenge(entering.hello(), reported, NOW))


def test_the_required_tls_group_is_accepted() -> None:
    coordinator, entering = server(), device(group=GROUP)

    entering.prove(coordinator.challenge(entering.hello(), GROUP, NOW))


def test_a_login_expires() -> None:
    coordinator, _keys, proof = proven()

    coordinator.open_proof(proof, NOW + timedelta(seconds=29))
    with pytest.raises(HandshakeError, match="expired"):
        coordinator.open_proof(proof, NOW + timedelta(seconds=30))


def test_a_proof_for_another_session_is_refused() -> None:
    coordinator, _keys, first = proven()
    _coordinator, _keys, second = proven()
    for name in ("session_id", "sealed_state", "confirmation"):
        mixed = security_pb2.SessionProof.FromString(first.SerializeToString())
        setattr(mixed, name, getattr(second, name))
        with pytest.raises(HandshakeError):
            coordinator.open_proof(mixed, NOW)


def test_a_signature_of_another_login_is_refused() -> None:
    coordinator, _keys, first = proven()
    _coordinator, _keys, second = proven()
    first.signature.CopyFrom(second.signature)

    with pytest.raises(HandshakeError):
        coordinator.open_proof(first, NOW)


def test_a_signature_of_another_key_is_refused() -> None:
    coordinator, _keys, proof = proven()

    with pytest.raises(HandshakeError):
        coordinator.open_proof(proof, NOW).verify(SigningKey.generate().public)


def test_a_device_that_signs_with_another_key_than_it_named_is_refused() -> None:
    class Swapped:
        """Names one key and signs with another."""

        public = DEVICE_KEY.public

        def sign(self, context: SigningContext, message: bytes) -> bytes:
            return SigningKey.generate().sign(context, message)

    coordinator = server()
    entering = DeviceLogin(
        realm=REALM, device_id="device", signing_key=Swapped(), server_key=SERVER_KEY.public
    )
    _keys, proof = entering.prove(coordinator.challenge(entering.hello(), GROUP, NOW))

    with pytest.raises(HandshakeError):
        coordinator.open_proof(proof, NOW).verify(DEVICE_KEY.public)


def test_a_downgraded_signature_algorithm_is_refused() -> None:
    coordinator, _keys, proof = proven()
    proof.signature.algorithm = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_44

    with pytest.raises(HandshakeError):
        coordinator.open_proof(proof, NOW).verify(DEVICE_KEY.public)


def test_a_state_of_another_coordinator_is_refused() -> None:
    _coordinator, _keys, proof = proven()

    with pytest.raises(HandshakeError):
        server(state_key=bytes(32)).open_proof(proof, NOW)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_proof_is_refused(data: st.DataObject) -> None:
    coordinator, _keys, proof = PROVEN
    name = data.draw(st.sampled_from(["sealed_state", "confirmation", "signature"]))
    changed = security_pb2.SessionProof.FromString(proof.SerializeToString())
    holder = changed.signature if name == "signature" else changed
    value = bytearray(getattr(holder, name))
    bit = data.draw(st.integers(0, len(value) * 8 - 1))
    value[bit // 8] ^= 1 << bit % 8
    setattr(holder, name, bytes(value))

    with pytest.raises(HandshakeError):
        coordinator.open_proof(changed, NOW)


PROVEN = proven()


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=1300))
def test_invented_messages_are_refused(data: bytes) -> None:
    hello = device().hello()
    hello.encapsulation = data
    proof = security_pb2.SessionProof(sealed_state=data, confirmation=data)
    _coordinator, keys, _proof = PROVEN

    for attempt in (
        lambda: server().challenge(hello, GROUP, NOW),
        lambda: device().prove(security_pb2.SessionChallenge(encapsulation=data)),
        lambda: server().open_proof(proof, NOW),
        lambda: keys.open_grant(security_pb2.SealedTokenGrant(sealed_grant=data)),
    ):
        with pytest.raises(HandshakeError):
            attempt()


def test_a_state_opens_for_its_own_handshake_only() -> None:
    sealed = seal_state(STATE_KEY, "login", b"payload", NOW + timedelta(seconds=1))

    assert open_state(STATE_KEY, "login", sealed, NOW) == b"payload"
    with pytest.raises(HandshakeError):
        open_state(STATE_KEY, "enrollment", sealed, NOW)
