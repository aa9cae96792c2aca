"""Encrypted secrets, key rings and trust documents, without files or a database."""

import base64
import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.envelope import add_signature
from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import ONLINE_ALGORITHMS, Algorithm, Provider, SigningContext, SigningKey
from qflare.crypto.symmetric import UnsealError
from qflare.v1 import security_pb2
from qflare_server.context import UnknownKeyError
from qflare_server.keys.ring import ROLES, SIGNING_ROLES, KeyRing, RingKey, generate
from qflare_server.keys.secret_files import Cost, KeyStoreError, decrypt_secret, encrypt_secret
from qflare_server.keys.trust_documents import (
    Trust,
    UntrustedDocumentError,
    draft_keyset,
    draft_root,
    sign_document,
)
from tests.conftest import START
from tests.support.identity import CHEAP

HEADER_BYTES = 33
REALM = "qflare"
SESSION_KEM = security_pb2.KEY_ROLE_SESSION_KEM


@pytest.fixture(scope="module")
def online() -> KeyRing:
    return KeyRing.generate_online(REALM)


@pytest.fixture(scope="module")
def root() -> KeyRing:
    return KeyRing.generate_root(REALM, 3)


def root_document(ring: KeyRing, version: int = 1, threshold: int = 2, **changes: Any) -> Any:
    keys = [key.public for key in ring.signing_keys()]
    document = draft_root(REALM, version, keys, threshold, START)
    return security_pb2.RootDocument.FromString(
        document.SerializeToString() + security_pb2.RootDocument(**changes).SerializeToString()
    )


def keyset_document(
    online: KeyRing, version: int = 1, root_version: int = 1, **changes: Any
) -> Any:
    keyset = draft_keyset(REALM, version, root_version, online.public(), START)
    return security_pb2.Keyset.FromString(
        keyset.SerializeToString() + security_pb2.Keyset(**changes).SerializeToString()
    )


@pytest.fixture(scope="module")
def signed_root(root: KeyRing) -> security_pb2.SignedEnvelope:
    return sign_document(root_document(root), root.signing_keys()[:2])


@pytest.fixture(scope="module")
def signed_keyset(root: KeyRing, online: KeyRing) -> security_pb2.SignedEnvelope:
    return sign_document(keyset_document(online), root.signing_keys()[1:])


class TestEncrypting:
    @given(secret=st.binary(max_size=2000), passphrase=st.binary(min_size=1, max_size=100))
    def test_what_was_encrypted_comes_back(self, secret: bytes, passphrase: bytes) -> None:
        assert decrypt_secret(encrypt_secret(secret, passphrase, CHEAP), passphrase) == secret

    def test_another_passphrase_is_refused(self) -> None:
        with pytest.raises(KeyStoreError):
            decrypt_secret(encrypt_secret(b"secret", b"one", CHEAP), b"two")

    @given(place=st.integers(min_value=0, max_value=HEADER_BYTES + 12 + 6 + 16 - 1))
    def test_every_bit_counts(self, place: int) -> None:
        data = bytearray(encrypt_secret(b"secret", b"one", CHEAP))
        data[place] ^= 1
        with pytest.raises(KeyStoreError):
            decrypt_secret(bytes(data), b"one")

    @given(data=st.binary(max_size=200))
    def test_other_bytes_are_refused(self, data: bytes) -> None:
        with pytest.raises(KeyStoreError):
            decrypt_secret(data, b"one")

    @given(length=st.integers(min_value=0, max_value=66))
    def test_a_shorter_file_is_refused(self, length: int) -> None:
        with pytest.raises(KeyStoreError):
            decrypt_secret(encrypt_secret(b"secret", b"one", CHEAP)[:length], b"one")

    @pytest.mark.parametrize(
        "cost",
        [Cost(0, 32, 1), Cost(65, 32, 1), Cost(1, 31, 1), Cost(1, 2**20 + 1, 1), Cost(1, 256, 17)],
    )
    def test_an_absurd_cost_is_refused(self, cost: Cost) -> None:
        with pytest.raises(KeyStoreError, match="out of range"):
            encrypt_secret(b"secret", b"one", cost)

    def test_a_file_cannot_ask_for_all_memory(self) -> None:
        data = bytearray(encrypt_secret(b"secret", b"one", CHEAP))
        data[9:13] = b"\xff\xff\xff\xff"
        with pytest.raises(KeyStoreError, match="out of range"):
            decrypt_secret(bytes(data), b"one")

    def test_an_empty_passphrase_is_refused(self) -> None:
        with pytest.raises(KeyStoreError):
            encrypt_secret(b"secret", b"", CHEAP)


class TestRing:
    def test_there_is_a_key_for_each_role(self, online: KeyRing) -> None:
        assert [key.role for key in online.public()] == list(ROLES)

    def test_what_was_written_is_read(self, online: KeyRing) -> None:
        read = KeyRing.from_bytes(online.to_bytes())
        assert list(read.public()) == list(online.public())
        assert (read.realm, read.state_key) == (online.realm, online.state_key)

    def test_signatures_are_the_keys(self, online: KeyRing) -> None:
        key = online.signing_keys()[0]
        signature = online.sign(key.public.key_id, SigningContext.MODEL, b"message")
        key.public.verify(SigningContext.MODEL, b"message", signature)

    def test_secrets_are_recovered(self, online: KeyRing) -> None:
        kem = next(entry.key for entry in online.keys if isinstance(entry.key, KemKey))
        encapsulation = kem.public.encapsulate()
        opened = online.decapsulate(kem.public.key_id, encapsulation.ciphertext)
        assert opened == encapsulation.secret

    def test_an_unknown_key_does_nothing(self, online: KeyRing) -> None:
        with pytest.raises(UnknownKeyError):
            online.sign("0" * 64, SigningContext.MODEL, b"message")
        with pytest.raises(UnknownKeyError):
            online.decapsulate("0" * 64, bytes(1120))

    def test_a_key_does_only_what_it_is_for(self, online: KeyRing) -> None:
        session_key, model_key = online.keys[0].key_id, online.keys[1].key_id
        with pytest.raises(UnknownKeyError):
            online.sign(session_key, SigningContext.MODEL, b"message")
        with pytest.raises(UnknownKeyError):
            online.decapsulate(model_key, bytes(1120))

    def test_a_malformed_encapsulation_is_refused(self, online: KeyRing) -> None:
        with pytest.raises(UnsealError):
            online.decapsulate(online.keys[0].key_id, bytes(3))

    def test_a_key_that_does_not_fit_its_public_half_is_refused(self) -> None:
        first, second = (SigningKey.generate(provider=Provider.CRYPTOGRAPHY) for _ in range(2))
        mixed = first.to_bytes()[:-32] + second.to_bytes()[-32:]
        ring = KeyRing(REALM, (RingKey(security_pb2.KEY_ROLE_MODEL, first),), bytes(32))
        data = ring.to_bytes().replace(_base64(first.to_bytes()), _base64(mixed))
        with pytest.raises(KeyStoreError):
            KeyRing.from_bytes(data)

    @given(data=st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
    def test_other_bytes_are_refused(self, data: bytes) -> None:
        with pytest.raises(KeyStoreError):
            KeyRing.from_bytes(data)

    @given(
        content=st.dictionaries(
            st.sampled_from(["format", "realm", "keys", "state_key", "bundle"]),
            st.none() | st.integers(0, 1) | st.text(max_size=5) | st.lists(st.integers()),
        )
    )
    @settings(max_examples=200)
    def test_other_json_is_refused(self, content: dict[str, Any]) -> None:
        with pytest.raises(KeyStoreError):
            KeyRing.from_bytes(json.dumps(content | {"keys": content.get("keys", 7)}).encode())

    def test_no_secret_is_in_the_repr(self, online: KeyRing) -> None:
        assert repr(online) == "KeyRing(realm='qflare')"

    def test_a_root_key_may_be_hash_based(self) -> None:
        ring = KeyRing.generate_root(REALM, 1, Algorithm.SLH_DSA_SHA2_128S)
        (key,) = KeyRing.from_bytes(ring.to_bytes()).signing_keys()
        assert key.public.algorithm is Algorithm.SLH_DSA_SHA2_128S

    @pytest.mark.parametrize("algorithm", sorted(ONLINE_ALGORITHMS))
    def test_the_algorithm_can_be_chosen(self, algorithm: Algorithm) -> None:
        key = generate(security_pb2.KEY_ROLE_MODEL, algorithm).key
        assert isinstance(key, SigningKey)
        assert key.public.algorithm is algorithm


class TestTrust:
    def test_documents_are_followed(
        self,
        online: KeyRing,
        signed_root: security_pb2.SignedEnvelope,
        signed_keyset: security_pb2.SignedEnvelope,
    ) -> None:
        trust = Trust.follow(REALM, [signed_root], signed_keyset)
        assert trust.kem_keys()[0].key_id == online.keys[0].key_id
        assert trust.first_threshold() == 2

    def test_too_few_signatures_on_the_root_are_refused(
        self, root: KeyRing, signed_keyset: security_pb2.SignedEnvelope
    ) -> None:
        signed = sign_document(root_document(root), root.signing_keys()[:1])
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed], signed_keyset)

    def test_too_few_signatures_on_the_keyset_are_refused(
        self, root: KeyRing, online: KeyRing, signed_root: security_pb2.SignedEnvelope
    ) -> None:
        signed = sign_document(keyset_document(online), root.signing_keys()[:1])
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed_root], signed)

    def test_a_root_is_no_keyset(self, signed_root: security_pb2.SignedEnvelope) -> None:
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed_root], signed_root)

    @pytest.mark.parametrize("change", [{"realm": "elsewhere"}, {"root_version": 2}])
    def test_a_keyset_of_another_realm_or_root_is_refused(
        self,
        root: KeyRing,
        online: KeyRing,
        signed_root: security_pb2.SignedEnvelope,
        change: dict[str, Any],
    ) -> None:
        signed = sign_document(keyset_document(online, **change), root.signing_keys())
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed_root], signed)

    def test_a_keyset_without_a_role_is_refused(
        self, root: KeyRing, online: KeyRing, signed_root: security_pb2.SignedEnvelope
    ) -> None:
        keyset = keyset_document(online)
        del keyset.keys[-1]
        signed = security_pb2.SignedEnvelope(payload=keyset.SerializeToString(deterministic=True))
        for signer in root.signing_keys():
            signed = add_signature(signed, signer, SigningContext.KEYSET)
        with pytest.raises(UntrustedDocumentError, match="role"):
            Trust.follow(REALM, [signed_root], signed)

    def test_no_root_is_no_trust(self, signed_keyset: security_pb2.SignedEnvelope) -> None:
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [], signed_keyset)

    def test_the_next_root_is_signed_by_both(
        self, root: KeyRing, online: KeyRing, signed_root: security_pb2.SignedEnvelope
    ) -> None:
        following = KeyRing.generate_root(REALM)
        document = root_document(following, 2, 1)
        signed = sign_document(document, root.signing_keys()[:2] + following.signing_keys())
        keyset = sign_document(keyset_document(online, 2, 2), following.signing_keys())
        trust = Trust.follow(REALM, [signed_root, signed], keyset)
        assert trust.root_key_ids() == [key.public.key_id for key in root.signing_keys()]

    @pytest.mark.parametrize("signers", ["previous", "next"])
    def test_the_next_root_needs_both(
        self,
        root: KeyRing,
        online: KeyRing,
        signed_root: security_pb2.SignedEnvelope,
        signers: str,
    ) -> None:
        following = KeyRing.generate_root(REALM)
        keys = root.signing_keys() if signers == "previous" else following.signing_keys()
        signed = sign_document(root_document(following, 2, 1), keys)
        keyset = sign_document(keyset_document(online, 2, 2), following.signing_keys())
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed_root, signed], keyset)

    def test_no_version_is_left_out(
        self, root: KeyRing, online: KeyRing, signed_root: security_pb2.SignedEnvelope
    ) -> None:
        signed = sign_document(root_document(root, 3), root.signing_keys())
        keyset = sign_document(keyset_document(online, 2, 3), root.signing_keys())
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [signed_root, signed], keyset)

    @given(payload=st.binary(max_size=200))
    def test_other_bytes_are_refused(
        self,
        payload: bytes,
        signed_keyset: security_pb2.SignedEnvelope,
    ) -> None:
        envelope = security_pb2.SignedEnvelope(payload=payload)
        with pytest.raises(UntrustedDocumentError):
            Trust.follow(REALM, [envelope], signed_keyset)

    def test_it_expires_with_the_earlier_of_both(
        self,
        signed_root: security_pb2.SignedEnvelope,
        signed_keyset: security_pb2.SignedEnvelope,
    ) -> None:
        trust = Trust.follow(REALM, [signed_root], signed_keyset)
        assert trust.expires_at() == START + timedelta(days=400)


class TestDrafting:
    def test_the_newest_key_of_a_role_comes_into_use(self, online: KeyRing) -> None:
        later = KeyRing.generate_online(REALM)
        keyset = draft_keyset(REALM, 2, 1, [*online.public(), *later.public()], START)
        in_use = [key for key in keyset.keys if key.role == SESSION_KEM]
        assert in_use == [later.public()[0], online.public()[0]]

    def test_it_stays_short_enough_to_be_signed(self, root: KeyRing) -> None:
        keys = [generate(role, Algorithm.ML_DSA_65).to_proto() for role in ROLES * 12]
        keyset = draft_keyset(REALM, 12, 1, keys, START)
        assert sum(key.role in SIGNING_ROLES for key in keyset.keys) == 22
        sign_document(keyset, root.signing_keys()[:1])


def _base64(data: bytes) -> bytes:
    return base64.b64encode(data)
