"""Vectors of exchanges: enrollment, login, refresh, proof of possession, sealed payloads."""

from datetime import timedelta
from typing import Any, Final

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealed_payloads import Direction, PayloadSealer, SealContext
from qflare.crypto.sealing import KemPublicKey, seal
from qflare.crypto.signing import SigningContext
from qflare.protocol.enrollment import DeviceEnrollment, EnrollmentServer
from qflare.protocol.login import DeviceLogin, LoginServer
from qflare.protocol.possession import CallProver, Refresh
from qflare.v1 import security_pb2 as pb
from tests.vectors.protocol.documents import SESSION_ID, device_id, device_key, moment
from tests.vectors.protocol.generate import (
    AT,
    REALM,
    STATE_KEY,
    kem_key,
    pattern,
    seed,
    signing_key,
)

TOKEN: Final = f"qfe1.{seed('token id')[:16].hex()}.{'A' * 43}"
METHOD: Final = "/qflare.v1.CoordinatorService/GetTask"
LATER: Final = AT + timedelta(seconds=1)


def decapsulate(key_id: str, encapsulation: bytes) -> bytes:
    """Decapsulate as the coordinator."""
    assert key_id == kem_key("session").public.key_id
    return kem_key("session").decapsulate(encapsulation)


def enrollment_server() -> EnrollmentServer:
    """The coordinator's side of an enrollment."""
    return EnrollmentServer(realm=REALM, state_key=STATE_KEY, decapsulate=decapsulate)


def enrollment() -> dict[str, Any]:
    """Section 4."""
    own = kem_key("device 1")
    device = DeviceEnrollment(
        realm=REALM,
        enrollment_token=TOKEN,
        signing_key=device_key(1),
        kem_key=own.public,
        decapsulate=own.decapsulate,
        server_key=kem_key("session").public,
    )
    sealed = device.request()
    application, challenge = enrollment_server().challenge(sealed, AT)
    receipt = pb.EnrollmentReceipt(
        realm=REALM,
        device_id=device_id(1),
        signature_key_id=device_key(1).public.key_id,
        kem_key_id=own.public.key_id,
        keyset_version=3,
        register_time=moment(),
        request_nonce=application.nonce,
    )
    signed = sign_envelope(signing_key("registrar"), SigningContext.RECEIPT, receipt)
    messages = {
        "sealed_enrollment": sealed,
        "challenge": challenge,
        "confirmation": device.confirm(challenge),
        "receipt": signed,
        "registrar_key": signing_key("registrar").public.to_proto(),
    }
    return {
        "realm": REALM,
        "enrollment_token": TOKEN,
        "server_kem_seed": seed("session").hex(),
        "device_signing_seed": seed("device 1").hex(),
        "device_kem_seed": seed("device 1").hex(),
        "state_key": STATE_KEY.hex(),
        "finished_at": LATER.isoformat(),
        "shared_secret": own.decapsulate(challenge.encapsulation).hex(),
        **{name: message.SerializeToString().hex() for name, message in messages.items()},
    }


def login_server() -> LoginServer:
    """The coordinator's side of a login."""
    return LoginServer(realm=REALM, state_key=STATE_KEY, decapsulate=decapsulate)


def device_login(hello: bytes = b"") -> DeviceLogin:
    """The device's side, with a one-time key from a seed and perhaps the hello of an earlier run."""
    login = DeviceLogin(
        realm=REALM,
        device_id=device_id(1),
        signing_key=device_key(1),
        server_key=kem_key("session").public,
    )
    login._ephemeral = kem_key("ephemeral")
    login._hello.ephemeral_key = kem_key("ephemeral").public.data
    if hello:
        login._hello = pb.SessionHello.FromString(hello)
        login._server_secret = kem_key("session").decapsulate(login._hello.encapsulation)
    return login


def login() -> dict[str, Any]:
    """Sections 5 and 6: a login, a refresh and the proof of a call."""
    device = device_login()
    challenge = login_server().challenge(device.hello(), "X25519MLKEM768", AT)
    keys, proof = device.prove(challenge)
    grant = pb.TokenGrant(
        access_token="qfx1.00.access",
        refresh_token="qfr1.00.refresh",
        access_expire_time=moment(900),
        refresh_expire_time=moment(604_800),
        keyset_version=3,
    )
    following = pb.TokenGrant(access_token="qfx1.01.access", refresh_token="qfr1.01.refresh")
    refresh = Refresh.start(keys.binding_key, keys.session_id, grant.refresh_token)
    messages = {
        "hello": device.hello(),
        "challenge": challenge,
        "proof": proof,
        "sealed_grant": keys.seal_grant(grant),
        "grant": grant,
        "refresh": refresh.request,
        "refresh_sealed_grant": refresh.seal_grant(following),
        "refresh_grant": following,
    }
    secrets = device._ephemeral.decapsulate(challenge.encapsulation)
    return {
        "realm": REALM,
        "server_kem_seed": seed("session").hex(),
        "ephemeral_kem_seed": seed("ephemeral").hex(),
        "device_signing_seed": seed("device 1").hex(),
        "state_key": STATE_KEY.hex(),
        "finished_at": LATER.isoformat(),
        "first_secret": device._server_secret.hex(),
        "second_secret": secrets.hex(),
        "grant_key": keys.grant_key.hex(),
        "binding_key": keys.binding_key.hex(),
        **{name: message.SerializeToString().hex() for name, message in messages.items()},
        "call": _call(keys.binding_key, grant.access_token),
    }


def _call(binding_key: bytes, access_token: str) -> dict[str, Any]:
    proof = CallProver(binding_key, access_token, 5).prove(METHOD, b"\x0a\x01x")
    return {
        "access_token": access_token,
        "method": METHOD,
        "first_message": b"\x0a\x01x".hex(),
        "sequence_number": 5,
        "qf-pop-bin": proof.hex(),
    }


def sealing() -> dict[str, Any]:
    """Sections 1 and 12: a sealed text, and sealed payloads of one and of two segments."""
    recipient = kem_key("device 1")
    sealed = seal(recipient.public, b"plaintext", b"info")
    return {
        "recipient_kem_seed": seed("device 1").hex(),
        "recipient_public_key": recipient.public.data.hex(),
        "recipient_key_id": recipient.public.key_id,
        "seal": {"plaintext": b"plaintext".hex(), "info": b"info".hex(), "sealed": sealed.hex()},
        "encapsulation": _encapsulation(recipient.public),
        "payloads": [_sealed_payload(size) for size in (0, 20, 1_048_561)],
    }


def _encapsulation(recipient: KemPublicKey) -> dict[str, str]:
    secret, ciphertext = recipient.encapsulate()
    return {"ciphertext": ciphertext.hex(), "secret": secret.hex()}


def seal_context() -> SealContext:
    """What the sealed payloads belong to."""
    return SealContext(
        REALM, Direction.UPDATE, SESSION_ID, 4, "00000000-0000-4000-9000-000000000001", device_id(1)
    )


def _sealed_payload(size_bytes: int) -> dict[str, Any]:
    context = seal_context()
    sealer = PayloadSealer(context, size_bytes)
    segments = list(sealer.seal([pattern(size_bytes)]))
    return {
        "realm": context.realm,
        "direction": str(context.direction),
        "training_session_id": context.training_session_id,
        "number": context.number,
        "update_id": context.update_id,
        "device_id": context.device_id,
        "size_bytes": size_bytes,
        "key": sealer.key._secret.hex(),
        "header": sealer.key.header.hex(),
        "wrapped_key": sealer.key.wrap(kem_key("device 1").public).SerializeToString().hex(),
        "segment_lengths": [len(segment) for segment in segments],
        "segment_tags": [segment[-16:].hex() for segment in segments],
    }


FILES: Final = {"enrollment.json": enrollment, "login.json": login, "sealing.json": sealing}
