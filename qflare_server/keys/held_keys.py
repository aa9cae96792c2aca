"""Signature keys of a provider by id, and the context in which each role signs."""

from typing import Final

from qflare.crypto.signing import PublicKey, SigningContext
from qflare.v1 import security_pb2
from qflare_server.keys.ring import KeyProvider, Role
from qflare_server.keys.trust_documents import Trust

CONTEXTS: Final[dict[Role, SigningContext]] = {
    security_pb2.KEY_ROLE_MODEL: SigningContext.MODEL,
    security_pb2.KEY_ROLE_REGISTRAR: SigningContext.RECEIPT,
    security_pb2.KEY_ROLE_LOG: SigningContext.TREE_HEAD,
    security_pb2.KEY_ROLE_TASK: SigningContext.TASK,
}
"""FIPS 204 signing context of each role."""


class _HeldKey:
    """A provider's signature key, adapted to `qflare.crypto.envelope`."""

    def __init__(self, provider: KeyProvider, public: PublicKey) -> None:
        self._provider = provider
        self._public = public

    @property
    def public(self) -> PublicKey:
        return self._public

    def sign(self, context: SigningContext, message: bytes) -> bytes:
        return self._provider.sign(self._public.key_id, context, message)


class HeldKeys:
    """A provider's keys by key id."""

    def __init__(self, provider: KeyProvider) -> None:
        self.provider = provider
        self.signers: dict[str, _HeldKey] = {}
        self.kem_key_ids: set[str] = set()
        for key in provider.public():
            if key.HasField("kem_key"):
                self.kem_key_ids.add(key.kem_key.key_id)
            else:
                public = PublicKey.from_proto(key.signature_key)
                self.signers[public.key_id] = _HeldKey(provider, public)

    def covers(self, trust: Trust) -> bool:
        """Return whether the current key of every role is held."""
        in_use = [trust.key_ids(role)[0] for role in CONTEXTS]
        session_key_id = trust.key_ids(security_pb2.KEY_ROLE_SESSION_KEM)[0]
        return session_key_id in self.kem_key_ids and self.signers.keys() >= set(in_use)
