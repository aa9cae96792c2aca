"""Key rotation of a device, safe against a crash at any point.

The next keys are stored beside the current ones before they are sent to the coordinator, and replace them once the
coordinator has accepted them. If the response is lost, the device does not know which keys are in force: it logs in
with the current keys and, if they are refused, with the next ones (`qflare_client.access.login`).

It does not schedule rotations.
"""

from dataclasses import replace

from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.signing import Algorithm
from qflare.evidence.statements import sign_rotation
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.access.login import Login
from qflare_client.errors import AlgorithmNotAcceptedError, RejectedError
from qflare_client.keystore.identity import DeviceKeys, Identity, load_keys, save_keys
from qflare_client.keystore.store import KeyStore
from qflare_client.rpc.caller import Calls

_NEXT_KEYS = "keys-next"


def pending_identity(store: KeyStore, identity: Identity) -> Identity | None:
    """Return the device with the keys of an interrupted rotation; None if there is none.

    Raises:
        KeyStoreError: They cannot be read.
    """
    keys = load_keys(store, _NEXT_KEYS)
    return None if keys is None else _rotated(identity, keys)


def settle(store: KeyStore, identity: Identity) -> None:
    """Make a device's next keys its current ones.

    Raises:
        KeyStoreError: They cannot be written.
    """
    identity.save(store)
    store.delete(_NEXT_KEYS)


def rotate(
    calls: Calls, store: KeyStore, login: Login, algorithm: Algorithm | None = None
) -> Identity:
    """Replace the keys and return the device with its next ones.

    Args:
        calls: Authenticated calls.
        store: The key store.
        login: The device's login.
        algorithm: Algorithm of the next signature key; None means the current one. An interrupted rotation is finished
            first, with the keys that it had.

    Raises:
        AlgorithmNotAcceptedError: The coordinator does not accept the algorithm.
        QflareClientError: The coordinator did not accept the new keys; the current ones stay in use.
    """
    wanted = algorithm or login.identity.keys.algorithm
    pending = pending_identity(store, login.identity)
    if pending is not None and pending.keys.algorithm is not wanted:
        _exchange(calls, store, login, pending)
        pending = None
    fresh = pending or _rotated(login.identity, DeviceKeys.generate(wanted))
    return _exchange(calls, store, login, fresh)


def _exchange(calls: Calls, store: KeyStore, login: Login, following: Identity) -> Identity:
    """Promote the next keys to current ones, unless the coordinator refuses them."""
    current = login.identity
    save_keys(store, following.keys, _NEXT_KEYS)
    request = messages.RotateKeysRequest(rotation=_statement(current, following))
    try:
        answer = calls.unary(calls.transport.stub.RotateKeys, request)
        following = replace(following, key_rotation_count=answer.key_rotation_count)
    except AlgorithmNotAcceptedError:
        store.delete(_NEXT_KEYS)  # refused: the coordinator checks this first
        raise
    except RejectedError:
        # An attempt whose response was lost may have changed the keys; then the login has promoted them already.
        if login.identity is current:
            raise
        return login.identity
    settle(store, following)
    login.use(following)
    return following


def _rotated(identity: Identity, keys: DeviceKeys) -> Identity:
    return replace(identity, keys=keys, key_rotation_count=identity.key_rotation_count + 1)


def _statement(current: Identity, following: Identity) -> security_pb2.SignedEnvelope:
    """Return the rotation request, signed by the current and the next key."""
    now = Timestamp()
    now.GetCurrentTime()
    rotation = security_pb2.KeyRotation(
        realm=current.realm,
        device_id=current.device_id,
        sequence_number=following.key_rotation_count,
        previous_key_id=current.keys.signing.public.key_id,
        signature_key=following.keys.signing.public.to_proto(),
        kem_key=following.keys.kem.public.to_proto(),
        create_time=now,
    )
    return sign_rotation(current.keys.signing, following.keys.signing, rotation)
