"""Identity of a helper: its keys, the signed document with the current KEM key, the pinned roots of its deployment.

All are in the helper's folder, a `qflare_client.keystore` key store, which one process can open. KEM keys are kept
after a rotation, because rounds that were opened before still use them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from qflare.crypto.sealing import KemKey
from qflare.crypto.signing import InvalidKeyError, SigningKey
from qflare.evidence.unmasking import open_helper, sign_helper
from qflare.v1 import helper_service_pb2, security_pb2
from qflare_client.errors import QflareClientError
from qflare_client.keystore.store import KeyStore
from qflare_helper.errors import StoreError

_DOCUMENT: Final = "helper.json"
_KEYS: Final = "helper-keys"


@dataclass(frozen=True)
class HelperIdentity:
    """A helper.

    Attributes:
        pinned: Realm, root key ids and threshold of the deployment.
        bundle: What the administrator of a coordinator gets: signed document, address, certificate authorities.
        signing: Signature key.
        kem_keys: KEM keys by id; the document names the current one.
    """

    pinned: security_pb2.BootstrapBundle
    bundle: helper_service_pb2.HelperBundle
    signing: SigningKey = field(repr=False)
    kem_keys: Mapping[str, KemKey] = field(repr=False)

    @property
    def helper_id(self) -> str:
        """Id of the helper: that of its signature key."""
        return self.signing.public.key_id

    @classmethod
    def generate(
        cls, pinned: security_pb2.BootstrapBundle, address: str, certificate_authorities: str
    ) -> Self:
        """Generate the keys of a helper.

        Args:
            pinned: Bootstrap bundle of the deployment; its enrollment token is not kept.
            address: Address for coordinators, host:port.
            certificate_authorities: PEM certificates; empty means those of the system.
        """
        kept = security_pb2.BootstrapBundle(
            realm=pinned.realm, root_key_ids=pinned.root_key_ids, threshold=pinned.threshold
        )
        kem, signing = KemKey.generate(), SigningKey.generate()
        bundle = helper_service_pb2.HelperBundle(
            document=_document(kept.realm, signing, kem, 1),
            address=address,
            certificate_authorities=certificate_authorities,
        )
        return cls(kept, bundle, signing, {kem.public.key_id: kem})

    def rotated(self) -> Self:
        """Return the helper with a new KEM key; the earlier ones are kept."""
        kem = KemKey.generate()
        current = open_helper(self.bundle.document, self.pinned.realm)
        document = _document(self.pinned.realm, self.signing, kem, current.sequence_number + 1)
        bundle = helper_service_pb2.HelperBundle()
        bundle.CopyFrom(self.bundle)
        bundle.document.CopyFrom(document)
        return type(self)(
            self.pinned, bundle, self.signing, {**self.kem_keys, kem.public.key_id: kem}
        )

    def save(self, store: KeyStore) -> None:
        """Store the keys, then the public facts.

        Raises:
            StoreError: They cannot be written.
        """
        secret = json.dumps(
            {
                "signing": self.signing.to_bytes().hex(),
                "kem": [key.to_bytes().hex() for key in self.kem_keys.values()],
            }
        )
        facts = {
            "pinned": json_format.MessageToDict(self.pinned),
            "bundle": json_format.MessageToDict(self.bundle),
        }
        try:
            store.write_secret(_KEYS, secret.encode())
            store.write_document(_DOCUMENT, facts)
        except QflareClientError as error:
            raise StoreError(str(error)) from error

    @classmethod
    def load(cls, store: KeyStore) -> Self:
        """Read a helper and test its keys.

        Raises:
            StoreError: There is none, or it is damaged.
        """
        try:
            secret, facts = store.read_secret(_KEYS), store.read_document(_DOCUMENT)
        except QflareClientError as error:
            raise StoreError(str(error)) from error
        if secret is None or not facts:
            raise StoreError(f"{store.home} holds no helper: run qflare-helper init")
        try:
            return cls._parsed(json.loads(secret), facts)
        except (
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
            InvalidKeyError,
            json_format.ParseError,
        ) as error:
            raise StoreError(f"{store.home} is damaged: {type(error).__name__}") from error

    @classmethod
    def _parsed(cls, secret: dict[str, Any], facts: dict[str, Any]) -> Self:
        pinned, bundle = security_pb2.BootstrapBundle(), helper_service_pb2.HelperBundle()
        json_format.ParseDict(facts["pinned"], pinned)
        json_format.ParseDict(facts["bundle"], bundle)
        signing = SigningKey.from_bytes(bytes.fromhex(secret["signing"]))
        kem_keys = [KemKey.from_bytes(bytes.fromhex(data)) for data in secret["kem"]]
        helper = open_helper(bundle.document, pinned.realm)
        by_id = {key.public.key_id: key for key in kem_keys}
        if helper.helper_id != signing.public.key_id or helper.kem_key.key_id not in by_id:
            raise ValueError("the document names other keys")
        return cls(pinned, bundle, signing, by_id)


def read_bootstrap(path: Path) -> security_pb2.BootstrapBundle:
    """Read a bootstrap bundle in JSON.

    Raises:
        StoreError: It cannot be read.
    """
    bundle = security_pb2.BootstrapBundle()
    try:
        json_format.Parse(path.read_text("utf-8"), bundle)
    except (OSError, ValueError, json_format.ParseError) as error:
        raise StoreError(f"{path} is no bootstrap bundle") from error
    return bundle


def _document(
    realm: str, signing: SigningKey, kem: KemKey, number: int
) -> security_pb2.SignedEnvelope:
    now = Timestamp()
    now.GetCurrentTime()
    document = security_pb2.HelperDocument(
        realm=realm,
        sequence_number=number,
        signature_key=signing.public.to_proto(),
        kem_key=kem.public.to_proto(),
        create_time=now,
    )
    return sign_helper(signing, document)
