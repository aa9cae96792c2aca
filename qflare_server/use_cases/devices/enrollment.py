"""Device enrollment.

Constructor: ``Enrollment(context, keys)``.

Invariants: an enrollment token enrolls one device (or replaces one device's keys), even under concurrent calls: the
UPDATE that consumes it runs in the transaction that stores the device. The same token with the same keys gets the
receipt again. Every refusal sends the same text; the audit log has the reason.

The cryptography of the messages is in `qflare.protocol.enrollment`.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from qflare.protocol import enrollment as protocol
from qflare.protocol.constraints import find_violations
from qflare.protocol.handshake import HandshakeError
from qflare.times import timestamp_of
from qflare.v1 import device_pb2, security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    AlgorithmNotAcceptedError,
    ConflictError,
    InvalidEnrollmentTokenError,
    InvalidRequestError,
)
from qflare_server.keys import ServerKeys
from qflare_server.storage.records import Device, UserToken
from qflare_server.storage.repository import audit, devices, membership, tokens
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import DeviceState, RiskLevel, TokenKind
from qflare_server.use_cases.access.authentication import hash_secret
from qflare_server.use_cases.access.failed_attempts import FailedAttempts, RefusedError
from qflare_server.use_cases.devices.administration import Profile
from qflare_server.use_cases.devices.keys import AcceptedAlgorithms, insert_key, key_columns

LOST_KEYS = "lost"
TRUSTED: Final = {"device_type": "type", "capabilities": "capabilities"}
"""Columns used by selection; the self-reported columns have the same names after `reported_`."""


@dataclass(frozen=True)
class EnrollmentResult:
    """A finished enrollment.

    Attributes:
        device_id: The device.
        receipt: An ``EnrollmentReceipt``, signed by the registrar key.
    """

    device_id: str
    receipt: security_pb2.SignedEnvelope


@dataclass(frozen=True)
class _Plan:
    """The effect of a valid application, computed before the transaction that applies it.

    `device` is the device whose keys are replaced; None for a new device, which gets `groups` and a name from `label`.
    `done` is set if the application was already applied.
    """

    token_id: str
    device_id: str
    device: Device | None = None
    done: EnrollmentResult | None = None
    groups: Sequence[str] = ()
    label: str = ""


class Enrollment:
    """Enrollment use cases; thread-safe."""

    def __init__(self, context: Context, keys: ServerKeys) -> None:
        self._context = context
        self._keys = keys
        self._refusals = FailedAttempts(context)
        self._algorithms = AcceptedAlgorithms(context.config)
        self._protocol = protocol.EnrollmentServer(
            realm=keys.realm, state_key=keys.state_key, decapsulate=keys.decapsulate
        )

    def keyset(self, known_root_version: int = 0) -> security_pb2.KeysetBundle:
        """Return the keyset in force, with the next root documents after a version."""
        return self._keys.bundle(known_root_version)

    @property
    def root_version(self) -> int:
        """Version of the latest root document."""
        return self._keys.trust.root.version

    @property
    def keyset_version(self) -> int:
        """Version of the keyset in force."""
        return self._keys.keyset_version

    def begin(
        self, caller: Caller, sealed: security_pb2.SealedEnrollment
    ) -> security_pb2.EnrollmentChallenge:
        """Answer the first half of an enrollment; changes nothing.

        Raises:
            InvalidEnrollmentTokenError: The token or another part of the request is invalid.
            AlgorithmNotAcceptedError: The token is valid, but the signature key's algorithm is not accepted.
        """
        try:
            application, challenge = self._protocol.challenge(sealed, self._context.clock())
            self._require_algorithm(caller, application, self._plan(application))
        except (HandshakeError, RefusedError) as error:
            raise self._refused(caller, error) from error
        return challenge

    def register(
        self, caller: Caller, confirmation: security_pb2.EnrollmentConfirmation
    ) -> EnrollmentResult:
        """Finish an enrollment: consume the token and store the device.

        Raises:
            InvalidEnrollmentTokenError: The token is invalid or used, or the confirmation is wrong.
            AlgorithmNotAcceptedError: As `begin`.
            InvalidRequestError: The device's profile is out of range.
            ConflictError: A concurrent call enrolled the same device; retry.
        """
        at = self._context.clock()
        try:
            application = self._protocol.finish(confirmation, at)
            plan = self._plan(application)
            if plan.done is not None:
                return plan.done
            self._require_algorithm(caller, application, plan)
            return self._admit(caller, application, plan, at)
        except (HandshakeError, RefusedError) as error:
            raise self._refused(caller, error) from error

    def _admit(
        self,
        caller: Caller,
        application: protocol.EnrollmentApplication,
        plan: _Plan,
        at: datetime,
    ) -> EnrollmentResult:
        says_nothing = plan.device is not None and not application.device_profile
        profile = {} if says_nothing else _profile_columns(application.device_profile)
        if plan.device is not None:
            profile = _keep_confirmed(plan.device, profile)
        receipt = self._receipt(application, plan, profile, at)
        enrolled = EnrollmentResult(plan.device_id, receipt)
        statement = enrolled.receipt.SerializeToString(deterministic=True)
        event = _event(application, plan)

        def work(session: Session) -> bool:
            if not tokens.consume(session, plan.token_id, at):
                return False
            if plan.device is None:
                _insert_device(session, plan, key_columns(application) | profile, at)
                if plan.groups:
                    membership.set_groups(session, plan.device_id, plan.groups)
            else:
                _replace_lost_keys(session, plan.device, key_columns(application) | profile, at)
            tokens.bind_to_device(session, plan.token_id, plan.device_id)
            first = plan.device is None
            insert_key(session, plan.device_id, application, statement, at, first=first)
            audit.record(session, caller, event, at)
            return True

        if self._context.database.write(work):
            return enrolled
        faster = self._plan(application).done
        if faster is None:
            raise RefusedError("the token was used by another device")
        return faster

    def _plan(self, application: protocol.EnrollmentApplication) -> _Plan:
        """Compute the effect of an application."""
        digest = hash_secret(application.enrollment_token)
        with self._context.database.read() as session:
            token = tokens.find_by_hash(session, digest)
            if token is None or token.kind != TokenKind.ENROLLMENT.value:
                raise RefusedError("unknown token")
            if token.used_at is not None:
                return _repeated(session, token, application)
            self._require_usable(token)
            if devices.get_key(session, application.signature_key.key_id) is not None:
                raise RefusedError("the signature key is known already")
            if token.device_id is None:
                groups = token.device_groups or ()
                return _Plan(token.id, str(uuid.uuid4()), groups=groups, label=token.subject)
            device = devices.get_device(session, token.device_id)
            if device is None or device.state == DeviceState.REVOKED.value:
                raise RefusedError("the device is revoked")
            return _Plan(token.id, device.id, device)

    def _require_algorithm(
        self, caller: Caller, application: protocol.EnrollmentApplication, plan: _Plan
    ) -> None:
        """Refuse an unaccepted key algorithm with its reason; a caller with a valid token may learn it."""
        if plan.done is not None:
            return
        try:
            self._algorithms.require(application.signature_key.algorithm)
        except AlgorithmNotAcceptedError as error:
            self._refusals.record(caller, "enrollment.refused", "enrollment", str(error))
            raise

    def _require_usable(self, token: UserToken) -> None:
        if token.revoked_at is not None:
            raise RefusedError("the token is revoked")
        if token.expires_at is not None and token.expires_at <= self._context.clock():
            raise RefusedError("the token has expired")

    def _receipt(
        self,
        application: protocol.EnrollmentApplication,
        plan: _Plan,
        profile: Mapping[str, Any],
        at: datetime,
    ) -> security_pb2.SignedEnvelope:
        known = plan.device
        receipt = security_pb2.EnrollmentReceipt(
            realm=self._keys.realm,
            device_id=plan.device_id,
            signature_key_id=application.signature_key.key_id,
            kem_key_id=application.kem_key.key_id,
            keyset_version=self._keys.keyset_version,
            register_time=timestamp_of(known.registered_at if known else at),
            request_nonce=application.nonce,
            key_rotation_count=known.key_rotation_count + 1 if known else 0,
            profile=_enrolled_profile(known, profile),
        )
        payload = receipt.SerializeToString(deterministic=True)
        return self._keys.sign(security_pb2.KEY_ROLE_REGISTRAR, payload)

    def _refused(self, caller: Caller, error: Exception) -> InvalidEnrollmentTokenError:
        self._refusals.record(caller, "enrollment.refused", "enrollment", str(error))
        return InvalidEnrollmentTokenError()


def _repeated(
    session: Session, token: UserToken, application: protocol.EnrollmentApplication
) -> _Plan:
    """Return the first result for a token that these keys have used."""
    key = devices.get_key(session, application.signature_key.key_id)
    same = (
        key is not None
        and key.device_id == token.device_id
        and key.kem_public_key == application.kem_key.data
        and key.retired_at is None
    )
    if not same or key is None or key.statement is None:
        raise RefusedError("the token is used")
    receipt = security_pb2.SignedEnvelope.FromString(key.statement)
    return _Plan(token.id, key.device_id, done=EnrollmentResult(key.device_id, receipt))


def _keep_confirmed(device: Device, profile: Mapping[str, Any]) -> dict[str, Any]:
    """Return the profile columns of a re-enrolling device; confirmed values are kept."""
    if device.confirmed_at is None or not profile:
        return dict(profile)
    kept = {name: value for name, value in profile.items() if name not in TRUSTED}
    return kept | {f"reported_{name}": profile[column] for column, name in TRUSTED.items()}


def _enrolled_profile(
    known: Device | None, profile: Mapping[str, Any]
) -> security_pb2.EnrolledProfile:
    """Return the values that selection uses after enrollment."""
    named = {
        column: profile[column] if column in profile or known is None else getattr(known, column)
        for column in TRUSTED
    }
    numbers = {
        name: float(value)
        for name, value in named["capabilities"].items()
        if isinstance(value, (int, float))
    }
    return security_pb2.EnrolledProfile(device_type=named["device_type"], capabilities=numbers)


def _insert_device(session: Session, plan: _Plan, columns: dict[str, Any], at: datetime) -> None:
    row = {
        "id": plan.device_id,
        "state": DeviceState.ACTIVE.value,
        "registered_at": at,
        "last_seen_at": at,
    }
    devices.insert_device(session, row | columns, label=plan.label)


def _replace_lost_keys(
    session: Session, known: Device, columns: dict[str, Any], at: datetime
) -> None:
    device = devices.lock_device(session, known.id)
    if device is None or device.state == DeviceState.REVOKED.value:
        raise RefusedError("the device is revoked")
    if device.key_rotation_count != known.key_rotation_count:
        raise ConflictError("the device's keys changed at this moment; repeat the call")
    if device.signature_key_id is not None:
        devices.retire_key(session, device.signature_key_id, LOST_KEYS, at)
    count = device.key_rotation_count + 1
    devices.update_device(session, device.id, columns | {"key_rotation_count": count})
    tokens.revoke_sessions(session, device.id, "keys replaced", at)


def _event(application: protocol.EnrollmentApplication, plan: _Plan) -> Event:
    details = {
        "token_id": plan.token_id,
        "signature_key_id": application.signature_key.key_id,
        "kem_key_id": application.kem_key.key_id,
    }
    subject = f"device:{plan.device_id}"
    if plan.groups:
        details["groups"] = ",".join(plan.groups)
    if plan.device is None:
        return Event("device.registered", subject, RiskLevel.MEDIUM, details)
    return Event("device.keys_replaced", subject, RiskLevel.HIGH, details)


def _profile_columns(data: bytes) -> dict[str, Any]:
    """Decode a device's self-reported profile; empty if absent.

    Raises:
        InvalidRequestError: It is malformed or out of range.
    """
    try:
        message = device_pb2.DeviceProfile.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError("device_profile: malformed", field="device_profile") from error
    InvalidRequestError.raise_for(find_violations(message, "device_profile."))
    return profile_of(message).columns()


def profile_of(message: device_pb2.DeviceProfile) -> Profile:
    """Return a device's profile from its message."""
    defaults = message.training_defaults
    return Profile(
        device_type=message.device_type,
        hardware_info=dict(message.hardware_info),
        network_info=dict(message.network_info),
        capabilities=dict(message.capabilities),
        local_epochs=defaults.local_epochs,
        batch_size=defaults.batch_size,
        learning_rate=defaults.learning_rate,
    )
