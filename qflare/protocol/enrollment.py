"""Enrollment handshake: the messages of both sides, without network, database or clock.

::

    device                                   coordinator
    SealedEnrollment   ------------------->  open_request, then look up the token
                       <-------------------  challenge
    EnrollmentConfirmation --------------->  finish, then consume the token and store the device
                       <-------------------  EnrollmentReceipt, signed by a registrar key

The request (token, both public keys, profile) is signed by the device's signature key, which proves
possession, and sealed to the coordinator's KEM key from the signed keyset, so no intermediary
sees the token. The challenge encapsulates a secret to the device's KEM key; the confirmation
is a MAC under it over the whole exchange, which proves possession of that key too.

A retry repeats the same request. Keys and token identify an enrollment: if the same keys have already
used a token, the caller answers with the earlier receipt.
"""

import hashlib
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from google.protobuf.message import DecodeError

from qflare.crypto.envelope import open_envelope, sign_envelope
from qflare.crypto.sealing import Decapsulate, KemPublicKey, open_sealed, seal
from qflare.crypto.signing import (
    MAX_MESSAGE_BYTES,
    ONLINE_ALGORITHMS,
    Algorithm,
    PublicKey,
    Signer,
    SigningContext,
    tagged_hash,
)
from qflare.crypto.symmetric import SECRET_BYTES, check_equal, hkdf_expand, mac
from qflare.protocol.handshake import (
    NONCE_BYTES,
    HandshakeError,
    KeyedDecapsulate,
    open_state,
    refusing,
    require,
    seal_state,
)
from qflare.v1 import security_pb2

MAX_SEALED_BYTES: Final = MAX_MESSAGE_BYTES + 16_384
"""Longest sealed request: the longest payload, a signature and the sealing around them."""

MAX_TOKEN_CHARACTERS: Final = 200
"""Longest enrollment token."""

_STATE_KIND: Final = "enrollment"


class DeviceEnrollment:
    """The device's side of one enrollment.

    Args:
        realm: Name of the deployment, from the bootstrap bundle.
        enrollment_token: One-time enrollment token.
        signing_key: The device's signature key.
        kem_key: The device's public KEM key.
        decapsulate: The private half of it.
        server_key: The coordinator's KEM key, from the verified keyset.
        device_profile: A serialized ``DeviceProfile``; may be empty.
    """

    def __init__(
        self,
        *,
        realm: str,
        enrollment_token: str,
        signing_key: Signer,
        kem_key: KemPublicKey,
        decapsulate: Decapsulate,
        server_key: KemPublicKey,
        device_profile: bytes = b"",
    ) -> None:
        self._realm = realm
        self._signature_key = signing_key.public
        self._kem_key = kem_key
        self._decapsulate = decapsulate
        self._server_key = server_key
        request = security_pb2.EnrollmentRequest(
            realm=realm,
            enrollment_token=enrollment_token,
            signature_key=signing_key.public.to_proto(),
            kem_key=kem_key.to_proto(),
            device_profile=device_profile,
            nonce=os.urandom(NONCE_BYTES),
            server_kem_key_id=server_key.key_id,
        )
        self._envelope = sign_envelope(signing_key, SigningContext.ENROLLMENT, request)

    def request(self) -> security_pb2.SealedEnrollment:
        """Return the first message; may be called again to retry."""
        info = _seal_info(self._realm, self._server_key.key_id)
        plaintext = self._envelope.SerializeToString()
        return security_pb2.SealedEnrollment(
            realm=self._realm,
            server_kem_key_id=self._server_key.key_id,
            sealed_request=seal(self._server_key, plaintext, info),
        )

    def confirm(
        self, challenge: security_pb2.EnrollmentChallenge
    ) -> security_pb2.EnrollmentConfirmation:
        """Return the second message, which proves possession of the KEM key.

        Raises:
            HandshakeError: The challenge is malformed.
        """
        with refusing("challenge"):
            secret = self._decapsulate(challenge.encapsulation)
        digest = hashlib.sha256(self._envelope.payload).digest()
        return security_pb2.EnrollmentConfirmation(
            sealed_state=challenge.sealed_state,
            confirmation=_confirmation(digest, challenge.nonce, challenge.encapsulation, secret),
        )

    def accept(
        self, receipt: security_pb2.SignedEnvelope, registrar_keys: Iterable[PublicKey]
    ) -> security_pb2.EnrollmentReceipt:
        """Check the receipt.

        Raises:
            HandshakeError: It is not signed by a registrar key, or is for another realm or device.
        """
        try:
            payload = open_envelope(receipt, SigningContext.RECEIPT, registrar_keys)
            opened = security_pb2.EnrollmentReceipt.FromString(payload)
        except (ValueError, DecodeError) as error:
            raise HandshakeError(f"receipt is not valid: {error}") from error
        check_receipt_form(opened)
        named = (opened.realm, opened.signature_key_id, opened.kem_key_id)
        own = (self._realm, self._signature_key.key_id, self._kem_key.key_id)
        require(named == own, "receipt is for another device")
        return opened


def check_receipt_form(receipt: security_pb2.EnrollmentReceipt) -> None:
    """Check the form of a receipt, independent of its device.

    Raises:
        HandshakeError: It is malformed.
    """
    require(receipt.realm, "receipt names no realm")
    require(receipt.device_id, "receipt names no device")
    require(receipt.signature_key_id, "receipt names no signature key")
    require(receipt.kem_key_id or receipt.in_process, "receipt names no KEM key")


@dataclass(frozen=True)
class EnrollmentApplication:
    """Enrollment request of a device, with the key possession proven so far.

    Attributes:
        enrollment_token: The token, not yet looked up.
        signature_key: Signature key; its possession is proven.
        kem_key: KEM key; its possession is proven once `EnrollmentServer.finish` returned this.
        device_profile: A serialized ``DeviceProfile``, not yet validated.
        nonce: The request's nonce, 32 bytes, for the receipt.
        request_digest: SHA-256 of the signed request, 32 bytes.
    """

    enrollment_token: str = field(repr=False)
    signature_key: PublicKey
    kem_key: KemPublicKey
    device_profile: bytes = field(repr=False)
    nonce: bytes
    request_digest: bytes


class EnrollmentServer:
    """Coordinator side of enrollment; stateless between calls.

    Args:
        realm: Name of the deployment.
        state_key: 32 random bytes, the same for all replicas.
        decapsulate: Decapsulation by the coordinator's session KEM keys.
        algorithms: Algorithms that a device's signature key may have.
        lifetime: Maximum time between the two calls of a device.
    """

    def __init__(
        self,
        *,
        realm: str,
        state_key: bytes,
        decapsulate: KeyedDecapsulate,
        algorithms: Collection[Algorithm] = ONLINE_ALGORITHMS,
        lifetime: timedelta = timedelta(seconds=60),
    ) -> None:
        self._realm = realm
        self._state_key = state_key
        self._decapsulate = decapsulate
        self._algorithms = frozenset(algorithms)
        self._lifetime = lifetime

    def open_request(self, sealed: security_pb2.SealedEnrollment) -> EnrollmentApplication:
        """Open the first message and check everything but the token.

        Raises:
            HandshakeError: It is not sealed to this coordinator, not signed by the key it brings, or
                brings a malformed key or one of an algorithm that is not allowed.
        """
        require(sealed.realm == self._realm, "enrollment is for another realm")
        require(len(sealed.sealed_request) <= MAX_SEALED_BYTES, "enrollment is too long")
        key_id = sealed.server_kem_key_id
        with refusing("enrollment"):
            plaintext = open_sealed(
                lambda encapsulation: self._decapsulate(key_id, encapsulation),
                sealed.sealed_request,
                _seal_info(self._realm, key_id),
            )
            envelope = security_pb2.SignedEnvelope.FromString(plaintext)
            request = security_pb2.EnrollmentRequest.FromString(envelope.payload)
            application = _application_of(request, envelope.payload)
            open_envelope(envelope, SigningContext.ENROLLMENT, [application.signature_key])
        require(request.realm == self._realm, "enrollment is for another realm")
        require(request.server_kem_key_id == key_id, "enrollment is for another key")
        self._check(application)
        return application

    def challenge(
        self, sealed: security_pb2.SealedEnrollment, now: datetime
    ) -> tuple[EnrollmentApplication, security_pb2.EnrollmentChallenge]:
        """Answer the first message; the caller rejects it if the token is invalid.

        Raises:
            HandshakeError: As `open_request`.
        """
        application = self.open_request(sealed)
        nonce = os.urandom(NONCE_BYTES)
        with refusing("KEM key"):
            secret, encapsulation = application.kem_key.encapsulate()
        expected = _confirmation(application.request_digest, nonce, encapsulation, secret)
        state = expected + application.request_digest + _remembered(application)
        sealed_state = seal_state(self._state_key, _STATE_KIND, state, now + self._lifetime)
        return application, security_pb2.EnrollmentChallenge(
            nonce=nonce, encapsulation=encapsulation, sealed_state=sealed_state
        )

    def finish(
        self, confirmation: security_pb2.EnrollmentConfirmation, now: datetime
    ) -> EnrollmentApplication:
        """Check the second message.

        The caller then consumes the token and stores the device in one transaction.

        Raises:
            HandshakeError: The confirmation is wrong, or the state is expired or not ours.
        """
        state = open_state(self._state_key, _STATE_KIND, confirmation.sealed_state, now)
        with refusing("confirmation"):
            check_equal(state[:SECRET_BYTES], confirmation.confirmation)
            request_digest = state[SECRET_BYTES : 2 * SECRET_BYTES]
            request = security_pb2.EnrollmentRequest.FromString(state[2 * SECRET_BYTES :])
            return _application_of(request, request_digest=request_digest)

    def _check(self, application: EnrollmentApplication) -> None:
        allowed = application.signature_key.algorithm in self._algorithms
        require(allowed, "signature algorithm is not allowed")
        require(len(application.nonce) == NONCE_BYTES, "nonce has another length")
        length = len(application.enrollment_token)
        require(0 < length <= MAX_TOKEN_CHARACTERS, "token has another length")


def _application_of(
    request: security_pb2.EnrollmentRequest, payload: bytes = b"", *, request_digest: bytes = b""
) -> EnrollmentApplication:
    return EnrollmentApplication(
        enrollment_token=request.enrollment_token,
        signature_key=PublicKey.from_proto(request.signature_key),
        kem_key=KemPublicKey.from_proto(request.kem_key),
        device_profile=request.device_profile,
        nonce=request.nonce,
        request_digest=request_digest or hashlib.sha256(payload).digest(),
    )


def _remembered(application: EnrollmentApplication) -> bytes:
    return security_pb2.EnrollmentRequest(
        enrollment_token=application.enrollment_token,
        signature_key=application.signature_key.to_proto(),
        kem_key=application.kem_key.to_proto(),
        device_profile=application.device_profile,
        nonce=application.nonce,
    ).SerializeToString()


def _seal_info(realm: str, server_key_id: str) -> bytes:
    return tagged_hash("qflare/v1/enroll", realm.encode(), server_key_id.encode())


def _confirmation(
    request_digest: bytes, nonce: bytes, encapsulation: bytes, secret: bytes
) -> bytes:
    """MAC over the exchange under a key from the encapsulated secret."""
    transcript = tagged_hash("qflare/v1/enroll transcript", request_digest, nonce, encapsulation)
    return mac(hkdf_expand(secret, b"qflare/v1/enroll confirm"), transcript)
