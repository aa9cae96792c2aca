"""Trust in keys: how it moves forward, and every way in which it must not move."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.envelope import add_signature, sign_envelope
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey
from qflare.protocol.keysets import (
    MAX_KEY_COUNT,
    MAX_ROOT_COUNT,
    ExpiredKeysetError,
    KeyRole,
    KeysetError,
    KeysetRollbackError,
    RefusedAlgorithmError,
    TrustedKeyset,
)
from qflare.v1 import security_pb2

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REALM = "realm"
ROOT_KEYS = [SigningKey.generate() for _ in range(3)]
NEXT_KEYS = [SigningKey.generate() for _ in range(2)]
SIGNING_ROLES = [role for role in KeyRole if role is not KeyRole.SESSION_KEM]
ONLINE_KEYS = {role: SigningKey.generate() for role in SIGNING_ROLES}
SPARE_KEY = SigningKey.generate()
KEM_KEY = KemKey.generate()
BOOTSTRAP = security_pb2.BootstrapBundle(
    realm=REALM, root_key_ids=[key.public.key_id for key in ROOT_KEYS], threshold=2
)
PINNED = TrustedKeyset.bootstrap(BOOTSTRAP)


def after(days: float) -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(NOW + timedelta(days=days))
    return moment


def signed(
    context: SigningContext,
    message: security_pb2.RootDocument | security_pb2.Keyset,
    signers: Sequence[SigningKey],
) -> security_pb2.SignedEnvelope:
    envelope = security_pb2.SignedEnvelope(payload=message.SerializeToString())
    for signer in signers:
        envelope = add_signature(envelope, signer, context)
    return envelope


def root(
    version: int = 1,
    *,
    signers: Sequence[SigningKey] = ROOT_KEYS[:2],
    keys: Sequence[SigningKey] = ROOT_KEYS,
    threshold: int = 2,
    realm: str = REALM,
    days: float = 300,
    context: SigningContext = SigningContext.ROOT,
) -> security_pb2.SignedEnvelope:
    document = security_pb2.RootDocument(
        realm=realm,
        version=version,
        expire_time=after(days),
        keys=[key.public.to_proto() for key in keys],
        threshold=threshold,
    )
    return signed(context, document, signers)


def role_keys() -> list[security_pb2.RoleKey]:
    kem = security_pb2.RoleKey(
        role=security_pb2.KEY_ROLE_SESSION_KEM, kem_key=KEM_KEY.public.to_proto()
    )
    return [kem, *(role_key(role, key) for role, key in ONLINE_KEYS.items())]


def role_key(role: int, key: SigningKey) -> security_pb2.RoleKey:
    number = security_pb2.KeyRole.ValueType(role)
    return security_pb2.RoleKey(role=number, signature_key=key.public.to_proto())


def keyset(
    version: int = 1,
    *,
    signers: Sequence[SigningKey] = ROOT_KEYS[:2],
    keys: Sequence[security_pb2.RoleKey] | None = None,
    root_version: int = 1,
    realm: str = REALM,
    days: float = 30,
    context: SigningContext = SigningContext.KEYSET,
) -> security_pb2.SignedEnvelope:
    document = security_pb2.Keyset(
        realm=realm,
        version=version,
        root_version=root_version,
        expire_time=after(days),
        keys=role_keys() if keys is None else keys,
    )
    return signed(context, document, signers)


def bundle(
    *roots: security_pb2.SignedEnvelope, keyset: security_pb2.SignedEnvelope
) -> security_pb2.KeysetBundle:
    return security_pb2.KeysetBundle(roots=roots, keyset=keyset)


TRUSTED = PINNED.updated(bundle(root(), keyset=keyset()), NOW)


def refused(
    trusted: TrustedKeyset,
    *roots: security_pb2.SignedEnvelope,
    keyset: security_pb2.SignedEnvelope,
    error: type[KeysetError] = KeysetError,
) -> None:
    with pytest.raises(error):
        trusted.updated(bundle(*roots, keyset=keyset), NOW)


def test_pins_lead_to_the_online_keys() -> None:
    assert (TRUSTED.root_version, TRUSTED.keyset_version) == (1, 1)
    assert TRUSTED.kem_key(NOW) == KEM_KEY.public
    for role, key in ONLINE_KEYS.items():
        assert TRUSTED.signature_keys(role, NOW) == (key.public,)


def test_the_first_key_of_a_role_is_the_one_in_use() -> None:
    spare = role_key(KeyRole.MODEL, SPARE_KEY)

    trusted = PINNED.updated(bundle(root(), keyset=keyset(keys=[spare, *role_keys()])), NOW)

    in_use, accepted = trusted.signature_keys(KeyRole.MODEL, NOW)
    assert (in_use, accepted) == (SPARE_KEY.public, ONLINE_KEYS[KeyRole.MODEL].public)


def test_nothing_is_trusted_before_the_first_keyset() -> None:
    assert (PINNED.root_version, PINNED.keyset_version) == (0, 0)
    with pytest.raises(KeysetError):
        PINNED.kem_key(NOW)
    with pytest.raises(KeysetError):
        PINNED.signature_keys(KeyRole.MODEL, NOW)


def test_the_kem_role_has_no_signature_keys() -> None:
    with pytest.raises(KeysetError):
        TRUSTED.signature_keys(KeyRole.SESSION_KEM, NOW)


def test_what_is_stored_is_checked_and_trusted_again() -> None:
    stored = security_pb2.KeysetBundle.FromString(TRUSTED.bundle.SerializeToString())

    assert PINNED.updated(stored, NOW).bundle == TRUSTED.bundle


@pytest.mark.parametrize("threshold", [-1, 0, 4])
def test_a_threshold_that_the_pins_cannot_reach_is_refused(threshold: int) -> None:
    pins = security_pb2.BootstrapBundle(
        realm=REALM, root_key_ids=BOOTSTRAP.root_key_ids, threshold=threshold
    )

    with pytest.raises(KeysetError):
        TrustedKeyset.bootstrap(pins)


def test_pins_without_a_realm_or_with_one_key_twice_are_refused() -> None:
    key_id = ROOT_KEYS[0].public.key_id
    twice = security_pb2.BootstrapBundle(realm=REALM, root_key_ids=[key_id] * 2, threshold=2)
    nameless = security_pb2.BootstrapBundle(root_key_ids=[key_id], threshold=1)

    for pins in (twice, nameless):
        with pytest.raises(KeysetError):
            TrustedKeyset.bootstrap(pins)


def test_the_first_root_needs_the_pinned_threshold_of_pinned_keys() -> None:
    strangers = [SigningKey.generate() for _ in range(2)]
    mixed = [*ROOT_KEYS, *strangers]

    refused(PINNED, root(signers=ROOT_KEYS[:1], threshold=1), keyset=keyset())
    refused(PINNED, root(signers=strangers, keys=mixed), keyset=keyset(signers=strangers))
    refused(PINNED, root(signers=[ROOT_KEYS[0], strangers[0]], keys=mixed), keyset=keyset())


def test_the_first_root_needs_its_own_threshold() -> None:
    refused(PINNED, root(threshold=3), keyset=keyset(signers=ROOT_KEYS))


def rotated(
    signers: Sequence[SigningKey] = (*ROOT_KEYS[:2], *NEXT_KEYS), version: int = 2
) -> security_pb2.SignedEnvelope:
    return root(version, signers=signers, keys=NEXT_KEYS)


NEXT_KEYSET = keyset(2, signers=NEXT_KEYS, root_version=2)


def test_the_root_rotates_one_step_at_a_time() -> None:
    trusted = TRUSTED.updated(bundle(rotated(), keyset=NEXT_KEYSET), NOW)

    assert (trusted.root_version, trusted.keyset_version) == (2, 2)


def test_a_fresh_device_follows_all_rotations() -> None:
    trusted = PINNED.updated(bundle(root(), rotated(), keyset=NEXT_KEYSET), NOW)

    assert trusted.root_version == 2


def test_an_expired_earlier_root_still_leads_on() -> None:
    trusted = PINNED.updated(bundle(root(days=-1), rotated(), keyset=NEXT_KEYSET), NOW)

    assert trusted.root_version == 2


def test_a_rotation_needs_both_thresholds() -> None:
    refused(TRUSTED, rotated(signers=NEXT_KEYS), keyset=NEXT_KEYSET)
    refused(TRUSTED, rotated(signers=ROOT_KEYS), keyset=NEXT_KEYSET)
    refused(TRUSTED, rotated(signers=[*ROOT_KEYS[:1], *NEXT_KEYS]), keyset=NEXT_KEYSET)
    refused(TRUSTED, rotated(signers=[*ROOT_KEYS[:2], *NEXT_KEYS[:1]]), keyset=NEXT_KEYSET)


def test_a_skipped_root_version_is_refused() -> None:
    refused(TRUSTED, rotated(version=3), keyset=NEXT_KEYSET)
    refused(PINNED, rotated(), root(), keyset=NEXT_KEYSET)
    refused(PINNED, rotated(), keyset=NEXT_KEYSET)


def test_a_changed_root_under_a_known_version_is_refused() -> None:
    refused(TRUSTED, root(days=400), keyset=keyset(2), error=KeysetRollbackError)


def test_a_keyset_of_the_root_before_is_refused() -> None:
    trusted = TRUSTED.updated(bundle(rotated(), keyset=NEXT_KEYSET), NOW)

    refused(trusted, keyset=keyset(3))
    refused(trusted, keyset=keyset(3, root_version=2))
    refused(trusted, keyset=keyset(3, signers=NEXT_KEYS))


def test_a_keyset_needs_the_threshold_of_the_root() -> None:
    online = list(ONLINE_KEYS.values())

    for signers in (ROOT_KEYS[:1], [], online, [ROOT_KEYS[0], online[0]]):
        refused(TRUSTED, keyset=keyset(2, signers=signers))


def test_another_context_is_refused() -> None:
    refused(PINNED, root(context=SigningContext.KEYSET), keyset=keyset())
    refused(PINNED, root(), keyset=keyset(context=SigningContext.ROOT))


def test_another_realm_is_refused() -> None:
    refused(PINNED, root(realm="other"), keyset=keyset())
    refused(PINNED, root(), keyset=keyset(realm="other"))


def test_a_higher_keyset_replaces_the_known_one() -> None:
    assert TRUSTED.updated(bundle(keyset=keyset(7)), NOW).keyset_version == 7


def test_a_lower_keyset_is_refused() -> None:
    trusted = TRUSTED.updated(bundle(keyset=keyset(7)), NOW)

    refused(trusted, keyset=keyset(6), error=KeysetRollbackError)
    refused(trusted, root(), keyset=keyset(1), error=KeysetRollbackError)


def test_a_changed_keyset_under_the_known_version_is_refused() -> None:
    refused(TRUSTED, keyset=keyset(days=31), error=KeysetRollbackError)


def test_the_same_bundle_again_changes_nothing() -> None:
    assert TRUSTED.updated(TRUSTED.bundle, NOW).bundle == TRUSTED.bundle


def test_a_refused_bundle_changes_nothing() -> None:
    before = TRUSTED.bundle

    refused(TRUSTED, rotated(), keyset=keyset(2, days=-1, signers=NEXT_KEYS, root_version=2))

    assert TRUSTED.bundle == before


def test_expired_documents_are_refused() -> None:
    refused(PINNED, root(), keyset=keyset(days=0), error=ExpiredKeysetError)
    refused(PINNED, root(days=0), keyset=keyset(), error=ExpiredKeysetError)
    refused(TRUSTED, keyset=keyset(2, days=-1), error=ExpiredKeysetError)


def test_keys_are_not_given_out_after_their_expiry() -> None:
    last, past = NOW + timedelta(days=29.9), NOW + timedelta(days=30)

    TRUSTED.kem_key(last)
    with pytest.raises(ExpiredKeysetError):
        TRUSTED.kem_key(past)
    with pytest.raises(ExpiredKeysetError):
        TRUSTED.signature_keys(KeyRole.MODEL, past)


def bad_keys() -> dict[str, list[security_pb2.RoleKey]]:
    good = role_keys()
    kem_as_model = security_pb2.RoleKey(
        role=security_pb2.KEY_ROLE_MODEL, kem_key=KEM_KEY.public.to_proto()
    )
    signature_as_kem = role_key(KeyRole.SESSION_KEM, SPARE_KEY)
    model_as_log = role_key(KeyRole.LOG, ONLINE_KEYS[KeyRole.MODEL])
    renamed = role_key(KeyRole.MODEL, SPARE_KEY)
    renamed.signature_key.key_id = "00" * 32
    return {
        "none": [],
        "no kem": good[1:],
        "no task": good[:-1],
        "twice": [*good, good[1]],
        "two roles": [*good, model_as_log],
        "kem key for a signing role": [*good, kem_as_model],
        "signature key for the kem role": [*good, signature_as_kem],
        "no role": [*good, role_key(0, SPARE_KEY)],
        "unknown role": [*good, role_key(77, SPARE_KEY)],
        "no key": [*good, security_pb2.RoleKey(role=security_pb2.KEY_ROLE_LOG)],
        "another key's id": [*good, renamed],
        "too many": good * (MAX_KEY_COUNT // len(good) + 1),
    }


@pytest.mark.parametrize("fault", bad_keys())
def test_a_signed_keyset_with_bad_keys_is_refused(fault: str) -> None:
    refused(PINNED, root(), keyset=keyset(keys=bad_keys()[fault]))


@pytest.mark.parametrize("version", [0, -1])
def test_a_document_without_a_version_is_refused(version: int) -> None:
    refused(PINNED, root(version), keyset=keyset())
    refused(PINNED, root(), keyset=keyset(version))


def test_a_root_with_bad_keys_is_refused() -> None:
    for keys, threshold in (([], 0), (ROOT_KEYS, 0), (ROOT_KEYS, 4), ([*ROOT_KEYS[:2]] * 2, 2)):
        refused(PINNED, root(keys=keys, threshold=threshold), keyset=keyset())
    refused(PINNED, root(keys=ROOT_KEYS * 6), keyset=keyset())


def test_a_document_without_an_expiry_is_refused() -> None:
    document = security_pb2.Keyset(realm=REALM, version=2, root_version=1, keys=role_keys())
    endless = security_pb2.Keyset(
        realm=REALM,
        version=2,
        root_version=1,
        keys=role_keys(),
        expire_time=Timestamp(seconds=10**15),
    )

    for broken in (document, endless):
        refused(TRUSTED, keyset=signed(SigningContext.KEYSET, broken, ROOT_KEYS[:2]))


def test_too_many_roots_are_refused_unread() -> None:
    refused(TRUSTED, *[root()] * (MAX_ROOT_COUNT + 1), keyset=keyset())


def test_an_empty_bundle_is_refused() -> None:
    for trusted in (PINNED, TRUSTED):
        with pytest.raises(KeysetError):
            trusted.updated(security_pb2.KeysetBundle(), NOW)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_signed_garbage_is_refused(payload: bytes) -> None:
    for context, key in (
        (SigningContext.ROOT, ROOT_KEYS[0]),
        (SigningContext.KEYSET, ROOT_KEYS[1]),
    ):
        envelope = sign_envelope(key, context, payload)
        refused(PINNED, envelope, keyset=keyset())
        refused(PINNED, root(), keyset=envelope)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_a_payload_is_refused(data: st.DataObject) -> None:
    changed = TRUSTED.bundle
    envelope = data.draw(st.sampled_from([changed.roots[0], changed.keyset]))
    payload = bytearray(envelope.payload)
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    payload[bit // 8] ^= 1 << bit % 8
    envelope.payload = bytes(payload)

    with pytest.raises(KeysetError):
        PINNED.updated(changed, NOW)


# Algorithms.


def hybrid_keyset(**keys: SigningKey) -> security_pb2.SignedEnvelope:
    """A keyset whose signature keys are hybrid, but for those given by the name of their role."""
    hybrid = {role: SigningKey.generate(Algorithm.ML_DSA_65_ED25519) for role in SIGNING_ROLES}
    chosen = {role: keys.get(role.name, key) for role, key in hybrid.items()}
    entries = [entry for entry in role_keys() if entry.HasField("kem_key")]
    return keyset(keys=entries + [role_key(role, key) for role, key in chosen.items()])


HYBRID_ONLY = TrustedKeyset.bootstrap(BOOTSTRAP, frozenset({Algorithm.ML_DSA_65_ED25519}))


def test_a_keyset_of_an_accepted_algorithm_is_trusted() -> None:
    trusted = HYBRID_ONLY.updated(bundle(root(), keyset=hybrid_keyset()), NOW)

    assert trusted.keyset_version == 1


@pytest.mark.parametrize("role", SIGNING_ROLES)
def test_a_keyset_with_one_key_of_another_algorithm_is_refused(role: KeyRole) -> None:
    envelope = hybrid_keyset(**{role.name: SPARE_KEY})

    with pytest.raises(RefusedAlgorithmError, match="ml-dsa-65, want ml-dsa-65-ed25519"):
        HYBRID_ONLY.updated(bundle(root(), keyset=envelope), NOW)


def test_root_keys_of_any_algorithm_lead_to_accepted_online_keys() -> None:
    assert {key.public.algorithm for key in ROOT_KEYS} == {Algorithm.ML_DSA_65}

    HYBRID_ONLY.updated(bundle(root(), keyset=hybrid_keyset()), NOW)


def test_a_hash_based_online_key_is_refused_unless_somebody_asked_for_it() -> None:
    slow = SigningKey.generate(Algorithm.SLH_DSA_SHA2_128S)
    envelope = hybrid_keyset(LOG=slow)

    with pytest.raises(RefusedAlgorithmError):
        PINNED.updated(bundle(root(), keyset=envelope), NOW)


def test_a_device_accepts_some_algorithm() -> None:
    with pytest.raises(KeysetError):
        TrustedKeyset.bootstrap(BOOTSTRAP, frozenset())
