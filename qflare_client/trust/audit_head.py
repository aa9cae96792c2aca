"""Audit-log monitoring: verifies that each head of the coordinator's audit log extends the previous one.

The last verified head is kept in the key store. A coordinator that rewrote or truncated its log cannot prove that its
next head extends the kept one. A coordinator that shows different logs to different devices is detected by comparing
their heads.

It does not read entries.
"""

from dataclasses import dataclass
from datetime import datetime

from google.protobuf.message import DecodeError

from qflare.evidence.statements import StatementError, check_growth, open_tree_head
from qflare.protocol.keysets import KeyRole
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import (
    InvalidRequestError,
    InvalidStatementError,
    KeyStoreError,
    RewrittenLogError,
)
from qflare_client.keystore.store import KeyStore
from qflare_client.rpc.caller import Calls
from qflare_client.times import moment
from qflare_client.trust.keyset import Trust

_DOCUMENT = "audit.json"


@dataclass(frozen=True)
class AuditHead:
    """A verified head of the audit log."""

    size: int
    """Number of entries."""

    root_digest: str
    """Merkle root over them, 64 hex digits."""

    created_at: datetime
    """Time of its signature, UTC."""

    envelope: security_pb2.SignedEnvelope
    """The head as received, with its signature, as evidence and for comparison with other devices."""


def read_head(
    calls: Calls, trust: Trust, store: KeyStore, timeout_s: float | None = None
) -> AuditHead:
    """Fetch the latest head, check that it extends the kept one, and keep it.

    Raises:
        RewrittenLogError: It does not extend the kept one.
        InvalidStatementError: It is not signed by the coordinator.
        KeyStoreError: The kept head is damaged, or the new one cannot be written.
        QflareClientError: The call failed.
    """
    known = _kept_head(store)
    request = messages.GetAuditHeadRequest(known_size=known.size)
    try:
        answer = calls.unary(calls.transport.stub.GetAuditHead, request, timeout_s=timeout_s)
    except InvalidRequestError as error:
        raise RewrittenLogError(f"the audit log has lost entries: {error}") from error
    try:
        keys = trust.keys_for(KeyRole.LOG, answer.head)
        head = open_tree_head(answer.head, keys, f"{trust.realm}/audit")
    except StatementError as error:
        raise InvalidStatementError(str(error)) from error
    if known.size:
        try:
            check_growth(known, head, answer.consistency)
        except StatementError as error:
            raise RewrittenLogError(f"the audit log was rewritten: {error}") from error
    store.write_document(_DOCUMENT, {"head": head.SerializeToString().hex()})
    return AuditHead(head.size, head.root_digest, moment(head.create_time), answer.head)


def _kept_head(store: KeyStore) -> security_pb2.TreeHead:
    """Return the last verified head; an empty one if there is none."""
    try:
        data = store.read_document(_DOCUMENT).get("head", "")
        return security_pb2.TreeHead.FromString(bytes.fromhex(data))
    except (TypeError, ValueError, DecodeError) as error:
        raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error
