"""Login handshake: the coordinator authenticates by KEM, the device by signature, with forward secrecy.

::

    device                                coordinator
    SessionHello       ---------------->  challenge
                       <----------------  SessionChallenge
    SessionProof       ---------------->  open_proof, then PendingLogin.verify with the device's key
                       <----------------  SealedTokenGrant

The device encapsulates to the coordinator's KEM key, so only the owner of that key can continue. It
also sends a one-time KEM key, to which the coordinator encapsulates. Once the one-time key is deleted,
recorded traffic can no longer be decrypted.

With H from `qflare.crypto.signing.tagged_hash` over every field of both messages:

    th  = H("qflare/v1/session transcript", version, realm, device id, signature key id,
            coordinator key id, nonce, one-time key, encapsulation,
            nonce, session id, encapsulation, TLS group)
    prk = HMAC("qflare/v1/session" || th, secret of the coordinator's key || of the one-time key)

HKDF-Expand of prk gives the keys of both confirmations, of the token grant and of the session
(`SessionKeys.binding_key`). The coordinator confirms before the device signs; the device signs th and
confirms th with its signature. No signature of the coordinator is needed.

The caller ensures that tokens are granted once per session id, and that the device may log in.
"""

import hashlib
import os
import struct
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from qflare.crypto.sealing import KemKey, KemPublicKey
from qflare.crypto.signing import PublicKey, Signer, SigningContext, tagged_hash, wire_algorithm
from qflare.crypto.symmetric import SECRET_BYTES, check_mac, decrypt, encrypt, hkdf_expand, mac
from qflare.protocol.handshake import (
    NONCE_BYTES,
    KeyedDecapsulate,
    open_state,
    refusing,
    require,
    seal_state,
)
from qflare.v1 import security_pb2

PROTOCOL_VERSION: Final = 1
"""The one version of the protocol."""

MAX_ID_CHARACTERS: Final = 255
"""Longest realm and device id in a hello."""

_SESSION_ID_BYTES: Final = 16
_STATE_KIND: Final = "login"
_STATE: Final = struct.Struct(">16s32s32s")


@dataclass(frozen=True)
class SessionKeys:
    """Shared session keys after a login.

    Attributes:
        session_id: Id of the session, 32 hex digits.
        grant_key: Key of the token grant, 32 bytes.
        binding_key: Key of refreshes and of proofs of possession, 32 bytes.
    """

    session_id: str
    grant_key: bytes = field(repr=False)
    binding_key: bytes = field(repr=False)

    def seal_grant(self, grant: security_pb2.TokenGrant) -> security_pb2.SealedTokenGrant:
        """Return the last message of a login, readable by the device only."""
        return seal_grant(self.grant_key, self.session_id, grant)

    def open_grant(self, sealed: security_pb2.SealedTokenGrant) -> security_pb2.TokenGrant:
        """Open the last message.

        Raises:
            HandshakeError: It is not the grant of this login.
        """
        return open_grant(self.grant_key, self.session_id, sealed)


def seal_grant(
    key: bytes, session_id: str, grant: security_pb2.TokenGrant
) -> security_pb2.SealedTokenGrant:
    """Seal tokens under the key of a login or of a refresh."""
    sealed = encrypt(key, grant.SerializeToString(), b"qflare/v1/grant" + session_id.encode())
    return security_pb2.SealedTokenGrant(sealed_grant=sealed)


def open_grant(
    key: bytes, session_id: str, sealed: security_pb2.SealedTokenGrant
) -> security_pb2.TokenGrant:
    """Open a grant sealed by `seal_grant`.

    Raises:
        HandshakeError: Another key or session, or it was changed.
    """
    with refusing("token grant"):
        associated = b"qflare/v1/grant" + session_id.encode()
        return security_pb2.TokenGrant.FromString(decrypt(key, sealed.sealed_grant, associated))


class DeviceLogin:
    """The device's side of one login.

    Args:
        realm: Name of the deployment.
        device_id: Id from the enrollment receipt.
        signing_key: The device's signature key.
        server_key: The coordinator's KEM key, from the verified keyset.
        required_tls_group: TLS group that the coordinator has to report, such as X25519MLKEM768. None
            accepts any.
    """

    def __init__(
        self,
        *,
        realm: str,
        device_id: str,
        signing_key: Signer,
        server_key: KemPublicKey,
        required_tls_group: str | None = None,
    ) -> None:
        self._signing_key = signing_key
        self._required_tls_group = required_tls_group
        self._ephemeral = KemKey.ephemeral()
        encapsulation = server_key.encapsulate()
        self._server_secret = encapsulation.secret
        self._hello = security_pb2.SessionHello(
            protocol_version=PROTOCOL_VERSION,
            realm=realm,
            device_id=device_id,
            signature_key_id=signing_key.public.key_id,
            server_kem_key_id=server_key.key_id,
            nonce=os.urandom(NONCE_BYTES),
            ephemeral_key=self._ephemeral.public.data,
            encapsulation=encapsulation.ciphertext,
        )

    def hello(self) -> security_pb2.SessionHello:
        """First message."""
        return self._hello

    def prove(
        self, challenge: security_pb2.SessionChallenge
    ) -> tuple[SessionKeys, security_pb2.SessionProof]:
        """Check the coordinator and answer.

        Returns:
            The keys, to open the grant with, and the third message.

        Raises:
            HandshakeError: The coordinator does not hold its key, the message was changed, or TLS was
                negotiated with another group than required.
        """
        with refusing("challenge"):
            ephemeral_secret = self._ephemeral.decapsulate(challenge.encapsulation)
        transcript = _transcript(self._hello, challenge)
        secrets = _Secrets.derive(transcript, self._server_secret + ephemeral_secret)
        with refusing("confirmation of the coordinator"):
            check_mac(secrets.server_confirmation, transcript, challenge.confirmation)
        if self._required_tls_group is not None:
            same = challenge.tls_group == self._required_tls_group
            require(same, f"TLS group is {challenge.tls_group!r}")
        return secrets.session(challenge.session_id), self._proof(challenge, transcript, secrets)

    def _proof(
        self, challenge: security_pb2.SessionChallenge, transcript: bytes, secrets: "_Secrets"
    ) -> security_pb2.SessionProof:
        signature = self._signing_key.sign(SigningContext.SESSION, transcript)
        return security_pb2.SessionProof(
            session_id=challenge.session_id,
            sealed_state=challenge.sealed_state,
            signature=security_pb2.Signature(
                key_id=self._signing_key.public.key_id,
                algorithm=wire_algorithm(self._signing_key.public.algorithm),
                signature=signature,
            ),
            confirmation=mac(secrets.device_confirmation, _confirmed(transcript, signature)),
        )


@dataclass(frozen=True)
class PendingLogin:
    """A login whose device has proven the session secret, but whose signature is not yet verified.

    Attributes:
        session_id: Id of the session, 32 hex digits.
        device_id: Claimed device id.
        signature_key_id: Id of the key that must have signed.
    """

    session_id: str
    device_id: str
    signature_key_id: str
    _transcript: bytes = field(repr=False)
    _secrets: "_Secrets" = field(repr=False)
    _signature: security_pb2.Signature = field(repr=False)

    def verify(self, key: PublicKey) -> SessionKeys:
        """Check the signature with the key that the device enrolled.

        Raises:
            HandshakeError: It is not the signature of this key over this login.
        """
        named = (self._signature.key_id, int(self._signature.algorithm))
        require(named == (key.key_id, key.algorithm), "signature is of another key")
        require(self.signature_key_id == key.key_id, "login is with another key")
        with refusing("signature"):
            key.verify(SigningContext.SESSION, self._transcript, self._signature.signature)
        return self._secrets.session(self.session_id)


class LoginServer:
    """Coordinator side of login; stateless between calls.

    Args:
        realm: Name of the deployment.
        state_key: 32 random bytes, the same for all replicas.
        decapsulate: Decapsulation by the coordinator's session KEM keys.
        lifetime: Maximum time between the two calls of a device.
    """

    def __init__(
        self,
        *,
        realm: str,
        state_key: bytes,
        decapsulate: KeyedDecapsulate,
        lifetime: timedelta = timedelta(seconds=30),
    ) -> None:
        self._realm = realm
        self._state_key = state_key
        self._decapsulate = decapsulate
        self._lifetime = lifetime

    def challenge(
        self, hello: security_pb2.SessionHello, tls_group: str, now: datetime
    ) -> security_pb2.SessionChallenge:
        """Answer the first message.

        Args:
            hello: As received.
            tls_group: TLS key exchange group of the connection; empty without TLS.
            now: The time, aware.

        Raises:
            HandshakeError: It is malformed, of another version or realm, or for a key that is not ours.
        """
        self._check(hello)
        with refusing("hello"):
            server_secret = self._decapsulate(hello.server_kem_key_id, hello.encapsulation)
            ephemeral = KemPublicKey(hello.ephemeral_key).encapsulate()
        challenge = security_pb2.SessionChallenge(
            nonce=os.urandom(NONCE_BYTES),
            session_id=os.urandom(_SESSION_ID_BYTES).hex(),
            encapsulation=ephemeral.ciphertext,
            tls_group=tls_group,
        )
        transcript = _transcript(hello, challenge)
        secrets = _Secrets.derive(transcript, server_secret + ephemeral.secret)
        challenge.confirmation = mac(secrets.server_confirmation, transcript)
        state = _pack_state(challenge.session_id, transcript, secrets, hello)
        challenge.sealed_state = seal_state(
            self._state_key, _STATE_KIND, state, now + self._lifetime
        )
        return challenge

    def open_proof(self, proof: security_pb2.SessionProof, now: datetime) -> PendingLogin:
        """Check the third message except its signature, whose key the caller looks up.

        Raises:
            HandshakeError: The device does not share the secret, or the state is expired, not ours, or
                of another session.
        """
        state = open_state(self._state_key, _STATE_KIND, proof.sealed_state, now)
        with refusing("proof"):
            session_id, transcript, secrets, hello = _unpack_state(state)
            confirmed = _confirmed(transcript, proof.signature.signature)
            check_mac(secrets.device_confirmation, confirmed, proof.confirmation)
        require(session_id == proof.session_id, "proof is for another session")
        return PendingLogin(
            session_id,
            hello.device_id,
            hello.signature_key_id,
            transcript,
            secrets,
            proof.signature,
        )

    def _check(self, hello: security_pb2.SessionHello) -> None:
        require(hello.protocol_version == PROTOCOL_VERSION, "unknown version of the protocol")
        require(hello.realm == self._realm, "login is for another realm")
        require(len(hello.nonce) == NONCE_BYTES, "nonce has another length")
        require(0 < len(hello.device_id) <= MAX_ID_CHARACTERS, "device id has another length")
        key_id = hello.signature_key_id
        require(len(key_id) == 2 * SECRET_BYTES, "key id has another length")


@dataclass(frozen=True)
class _Secrets:
    """Keys of one login; all follow from `prk`."""

    prk: bytes = field(repr=False)

    @classmethod
    def derive(cls, transcript: bytes, shared: bytes) -> "_Secrets":
        return cls(mac(b"qflare/v1/session" + transcript, shared))

    @property
    def server_confirmation(self) -> bytes:
        return hkdf_expand(self.prk, b"qflare/v1/session confirm coordinator")

    @property
    def device_confirmation(self) -> bytes:
        return hkdf_expand(self.prk, b"qflare/v1/session confirm device")

    def session(self, session_id: str) -> SessionKeys:
        return SessionKeys(
            session_id,
            hkdf_expand(self.prk, b"qflare/v1/session grant"),
            hkdf_expand(self.prk, b"qflare/v1/session binding"),
        )


def _pack_state(
    session_id: str, transcript: bytes, secrets: _Secrets, hello: security_pb2.SessionHello
) -> bytes:
    """Serialize the login state: ids, transcript, and the key from which all others derive."""
    names = security_pb2.SessionHello(
        device_id=hello.device_id, signature_key_id=hello.signature_key_id
    )
    fixed = _STATE.pack(bytes.fromhex(session_id), transcript, secrets.prk)
    return fixed + names.SerializeToString()


def _unpack_state(state: bytes) -> tuple[str, bytes, _Secrets, security_pb2.SessionHello]:
    session_id, transcript, prk = _STATE.unpack_from(state)
    names = security_pb2.SessionHello.FromString(state[_STATE.size :])
    return session_id.hex(), transcript, _Secrets(prk), names


def _transcript(
    hello: security_pb2.SessionHello, challenge: security_pb2.SessionChallenge
) -> bytes:
    return tagged_hash(
        "qflare/v1/session transcript",
        struct.pack(">I", hello.protocol_version),
        hello.realm.encode(),
        hello.device_id.encode(),
        hello.signature_key_id.encode(),
        hello.server_kem_key_id.encode(),
        hello.nonce,
        hello.ephemeral_key,
        hello.encapsulation,
        challenge.nonce,
        challenge.session_id.encode(),
        challenge.encapsulation,
        challenge.tls_group.encode(),
    )


def _confirmed(transcript: bytes, signature: bytes) -> bytes:
    return transcript + hashlib.sha256(signature).digest()
