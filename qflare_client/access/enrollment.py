"""Device enrollment: from a bootstrap bundle to a key store with an identity.

The keys are stored before the first call, so an interrupted enrollment is finished by enrolling again: the same token
with the same keys yields the same device.

The cryptography of the messages is elsewhere (see `qflare.protocol.enrollment`).
"""

from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path

from google.protobuf import json_format

from qflare.crypto.signing import ONLINE_ALGORITHMS, Algorithm
from qflare.protocol.enrollment import DeviceEnrollment
from qflare.protocol.handshake import HandshakeError
from qflare.protocol.keysets import KeyRole
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import device_pb2, security_pb2
from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError, KeyStoreError, VerificationError
from qflare_client.keystore.identity import DeviceKeys, Identity, load_keys, read_facts, save_keys
from qflare_client.keystore.passphrase import secret_coding
from qflare_client.keystore.store import KeyStore
from qflare_client.rpc.caller import Calls
from qflare_client.rpc.retry import RetryPolicy
from qflare_client.rpc.tls import Tls, trusting
from qflare_client.rpc.transport import Transport
from qflare_client.tasks import TrainingDefaults
from qflare_client.trust.keyset import Trust


def read_bundle(path: Path) -> security_pb2.BootstrapBundle:
    """Read a bootstrap bundle: the JSON form of ``qflare.v1.BootstrapBundle``.

    Raises:
        KeyStoreError: The file cannot be read or is not a bundle.
    """
    try:
        return json_format.Parse(path.read_text(encoding="utf-8"), security_pb2.BootstrapBundle())
    except json_format.ParseError as error:
        raise KeyStoreError(
            f"bootstrap bundle {path}: {error}; if a later release made it, upgrade qflare"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise KeyStoreError(f"bootstrap bundle {path}: {error}") from error


def enroll(
    bundle: security_pb2.BootstrapBundle | Path | str,
    *,
    home: Path | str,
    address: str | None = None,
    device_type: str = "",
    capabilities: Mapping[str, float] | None = None,
    hardware_info: Mapping[str, str] | None = None,
    network_info: Mapping[str, str] | None = None,
    defaults: TrainingDefaults | None = None,
    passphrase: str | None = None,
    tls: Tls | None = None,
    insecure: bool = False,
    retry: RetryPolicy | None = None,
    algorithm: Algorithm | None = None,
    server_algorithms: Collection[Algorithm] = ONLINE_ALGORITHMS,
) -> Identity:
    """Enroll this device and store its identity. An enrolled device is not changed.

    Args:
        bundle: Bootstrap bundle from the administrator, or its file.
        home: Folder of the key store; created if it does not exist.
        address: Coordinator, host:port; None means the bundle's.
        device_type: Kind of device, such as phone; at most 100 characters.
        capabilities: Numbers used for device selection, such as ram_mib.
        hardware_info: Hardware, such as gpu, as text.
        network_info: Network, such as link, as text.
        defaults: The device's own training settings.
        passphrase: Encrypts the keys; None means that only file permissions protect them.
        tls: TLS settings. Certificate authorities default to those of the bundle, then to those of the system.
        insecure: Use plaintext with any address.
        retry: Retry policy of calls.
        algorithm: Algorithm of the device's signature key; None means that of an interrupted enrollment, or ML-DSA-65.
        server_algorithms: Accepted algorithms of the coordinator's online signature keys, one or more, from now on: a
            keyset with a key of another algorithm is refused.

    Raises:
        InvalidArgumentError: An argument cannot be used.
        AlgorithmNotAcceptedError: The coordinator does not accept the algorithm of devices.
        InvalidEnrollmentTokenError: The token is unknown, used, expired or revoked.
        UntrustedKeysetError: The coordinator's keyset does not lead to the bundle's root keys.
        VerificationError: The coordinator's receipt does not verify.
        KeyStoreError: The key store cannot be used.
        QflareClientError: A call failed.
    """
    home = arguments.path("home", home)
    if not isinstance(bundle, security_pb2.BootstrapBundle):
        bundle = read_bundle(arguments.path("bundle", bundle))
    known = arguments.optional("defaults", defaults, TrainingDefaults)
    policy = arguments.optional("retry", retry, RetryPolicy) or RetryPolicy()
    arguments.optional("algorithm", algorithm, Algorithm)
    arguments.flag("insecure", insecure)
    profile = arguments.message(
        device_pb2.DeviceProfile,
        device_type=device_type,
        capabilities=capabilities,
        hardware_info=hardware_info,
        network_info=network_info,
        training_defaults=(known or TrainingDefaults()).to_proto(),
    )
    accepted = _algorithms(server_algorithms)
    tls = trusting(tls, bundle.certificate_authorities)
    used = bundle.address if address is None else address
    calls = Calls(Transport(used, tls=tls, insecure=insecure), policy)
    with closing(calls), KeyStore(home, secret_coding(passphrase)) as store:
        if read_facts(home):
            return Identity.load(store)
        trust = Trust.begin(store, bundle, calls, accepted)
        return _enroll(store, calls, trust, _keys(store, algorithm), bundle, profile)


def _algorithms(algorithms: Collection[Algorithm]) -> frozenset[Algorithm]:
    if isinstance(algorithms, set | frozenset | list | tuple) and algorithms:
        return frozenset(
            arguments.instance("server_algorithms", one, Algorithm) for one in algorithms
        )
    raise InvalidArgumentError(f"server_algorithms: got {algorithms!r:.200}, want one or more")


def _keys(store: KeyStore, algorithm: Algorithm | None) -> DeviceKeys:
    """Return the keys of an interrupted enrollment with this algorithm, or generate new ones."""
    keys = load_keys(store)
    if keys is None or algorithm not in {None, keys.algorithm}:
        keys = DeviceKeys.generate(algorithm or Algorithm.ML_DSA_65)
        save_keys(store, keys)
    return keys


def _enroll(
    store: KeyStore,
    calls: Calls,
    trust: Trust,
    keys: DeviceKeys,
    bundle: security_pb2.BootstrapBundle,
    profile: device_pb2.DeviceProfile,
) -> Identity:
    answer, receipt = _exchange(calls, trust, keys, bundle, profile)
    identity = Identity(
        realm=bundle.realm,
        address=calls.transport.address,
        device_id=receipt.device_id,
        key_rotation_count=receipt.key_rotation_count,
        certificate_authorities=bundle.certificate_authorities,
        receipt=answer.receipt.SerializeToString().hex(),
        keys=keys,
        helper_key_ids=tuple(bundle.helper_key_ids),
        device_name=answer.device_name,
    )
    identity.save(store)
    return identity


def _exchange(
    calls: Calls,
    trust: Trust,
    keys: DeviceKeys,
    bundle: security_pb2.BootstrapBundle,
    profile: device_pb2.DeviceProfile,
) -> tuple[messages.RegisterResponse, security_pb2.EnrollmentReceipt]:
    enrollment = DeviceEnrollment(
        realm=bundle.realm,
        enrollment_token=bundle.enrollment_token,
        signing_key=keys.signing,
        kem_key=keys.kem.public,
        decapsulate=keys.kem.decapsulate,
        server_key=trust.session_key(),
        device_profile=profile.SerializeToString(),
    )
    stub = calls.transport.stub
    begin = messages.BeginRegistrationRequest(enrollment=enrollment.request())
    challenge = calls.unary(stub.BeginRegistration, begin).challenge
    try:
        confirmation = enrollment.confirm(challenge)
        answer = calls.unary(stub.Register, messages.RegisterRequest(confirmation=confirmation))
        return answer, enrollment.accept(answer.receipt, trust.signature_keys(KeyRole.REGISTRAR))
    except HandshakeError as error:
        raise VerificationError(f"enrollment: {error}") from error
