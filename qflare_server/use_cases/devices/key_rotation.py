"""Device key rotation, signed by the previous and the next key.

Constructor: ``KeyRotations(context, keys)``.

Invariants: a rotation is applied once, in order, and only from the current keys. It is stored with the next key as
evidence. The device's other logins end; the one that rotates continues. Repeating a rotation returns the same answer.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto import signing
from qflare.crypto.envelope import open_envelope
from qflare.crypto.sealing import KemPublicKey
from qflare.crypto.signing import InvalidKeyError, PublicKey, SigningContext, algorithm_of
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.errors import (
    AlgorithmNotAcceptedError,
    InvalidRequestError,
    InvalidSignatureError,
    UnauthenticatedError,
    WrongStateError,
)
from qflare_server.keys import ServerKeys
from qflare_server.storage.records import Device
from qflare_server.storage.repository import audit, devices, tokens
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel
from qflare_server.use_cases.access.authentication import Principal
from qflare_server.use_cases.access.failed_attempts import FailedAttempts
from qflare_server.use_cases.access.rate_limits import hourly_budget
from qflare_server.use_cases.access.statements import parse_statement
from qflare_server.use_cases.devices.keys import AcceptedAlgorithms, insert_key, key_columns

ROTATED: Final = "rotated"


@dataclass(frozen=True)
class _Keys:
    """Next keys of a device."""

    signature_key: PublicKey
    kem_key: KemPublicKey


class KeyRotations:
    """Key rotation use case; thread-safe."""

    def __init__(self, context: Context, keys: ServerKeys) -> None:
        self._context = context
        self._realm = keys.realm
        self._refusals = FailedAttempts(context)
        self._algorithms = AcceptedAlgorithms(context.config)
        self._budget = hourly_budget(context.config.max_device_records_per_hour, "key rotations")

    def rotate(
        self, caller: Caller, principal: Principal, envelope: security_pb2.SignedEnvelope
    ) -> int:
        """Rotate the keys of the calling device.

        Args:
            caller: The caller, for the audit log.
            principal: The authenticated caller.
            envelope: A ``KeyRotation``, signed by both keys.

        Returns:
            Number of the device's key rotations.

        Raises:
            UnauthenticatedError: The caller is not a device.
            InvalidRequestError: The rotation is malformed, or for another realm or device.
            InvalidSignatureError: Not signed by both keys.
            AlgorithmNotAcceptedError: The next signature key's algorithm is not accepted.
            TooManyRequestsError: The device has used up its rotations of the hour.
            WrongStateError: It does not follow the current keys; the metadata carries the rotation count.
        """
        rotation, keys = _read(envelope)
        if principal.device_id is None:
            raise UnauthenticatedError
        if (rotation.realm, rotation.device_id) != (self._realm, principal.device_id):
            raise InvalidRequestError("rotation: for another realm or device", field="rotation")
        with self._context.database.read() as session:
            known = devices.get_key(session, rotation.previous_key_id)
            if known is None or known.device_id != principal.device_id:
                raise WrongStateError("previous_key_id: not a key of this device")
            previous = PublicKey(algorithm_of(known.algorithm), known.public_key)
        try:
            open_envelope(envelope, SigningContext.ROTATION, [previous, keys.signature_key], 2)
        except signing.InvalidSignatureError as error:
            subject = f"device:{principal.device_id}"
            self._refusals.record(caller, "rotation.refused", subject, str(error))
            raise InvalidSignatureError("rotation: not signed by both keys") from error
        self._budget.take(principal.device_id)
        try:
            return self._exchange(caller, principal, rotation, keys, envelope)
        except AlgorithmNotAcceptedError as error:
            subject = f"device:{principal.device_id}"
            self._refusals.record(caller, "rotation.refused", subject, str(error))
            raise

    def _exchange(
        self,
        caller: Caller,
        principal: Principal,
        rotation: security_pb2.KeyRotation,
        keys: _Keys,
        envelope: security_pb2.SignedEnvelope,
    ) -> int:
        at = self._context.clock()
        statement = envelope.SerializeToString(deterministic=True)
        details = {
            "previous_key_id": rotation.previous_key_id,
            "signature_key_id": keys.signature_key.key_id,
            "kem_key_id": keys.kem_key.key_id,
        }

        def work(session: Session) -> int:
            device = devices.lock_device(session, rotation.device_id)
            if device is None:
                raise UnauthenticatedError
            if _is_done(session, device, keys, envelope):
                return device.key_rotation_count
            count = _require_next(device, rotation)
            self._algorithms.require(keys.signature_key.algorithm)
            if devices.get_key(session, keys.signature_key.key_id) is not None:
                raise InvalidRequestError("signature_key: was used before", field="rotation")
            devices.retire_key(session, rotation.previous_key_id, ROTATED, at)
            columns = key_columns(keys) | {"key_rotation_count": count}
            devices.update_device(session, device.id, columns)
            insert_key(session, device.id, keys, statement, at)
            self._end_other_logins(session, principal, at)
            event = Event("device.keys_rotated", f"device:{device.id}", RiskLevel.MEDIUM, details)
            audit.record(session, caller, event, at)
            return count

        return self._context.database.write(work)

    def _end_other_logins(self, session: Session, principal: Principal, at: datetime) -> None:
        token = tokens.get_token(session, principal.token_id or "")
        family_id = None if token is None else token.family_id
        tokens.revoke_sessions(
            session, principal.device_id or "", "keys rotated", at, except_family=family_id
        )


def _read(envelope: security_pb2.SignedEnvelope) -> tuple[security_pb2.KeyRotation, _Keys]:
    rotation = parse_statement(security_pb2.KeyRotation, envelope.payload, "rotation.payload")
    try:
        keys = _Keys(
            PublicKey.from_proto(rotation.signature_key), KemPublicKey.from_proto(rotation.kem_key)
        )
    except InvalidKeyError as error:
        raise InvalidRequestError("rotation: malformed", field="rotation") from error
    return rotation, keys


def _is_done(
    session: Session, device: Device, keys: _Keys, envelope: security_pb2.SignedEnvelope
) -> bool:
    """Return whether this rotation introduced the current keys."""
    if device.signature_key_id != keys.signature_key.key_id:
        return False
    key = devices.get_key(session, keys.signature_key.key_id)
    if key is None or key.statement is None:
        return False
    return security_pb2.SignedEnvelope.FromString(key.statement).payload == envelope.payload


def _require_next(device: Device, rotation: security_pb2.KeyRotation) -> int:
    """Return the rotation count after a rotation that follows the current keys."""
    count = device.key_rotation_count + 1
    got = (rotation.sequence_number, rotation.previous_key_id)
    if got != (count, device.signature_key_id):
        error = WrongStateError(f"sequence_number: got {rotation.sequence_number}, want {count}")
        error.metadata["key_rotation_count"] = str(device.key_rotation_count)
        raise error
    return count
