"""Validation of update headers against round and device, before the payload is read.

A round's expectations are immutable once it is open, and are read once.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from sqlalchemy.orm import Session

from qflare.crypto.sealed_payloads import WRAPPED_KEY_BYTES, SealContext, check_header
from qflare.crypto.sealing import UnsealError
from qflare.crypto.signing import InvalidSignatureError as BadSignatureError
from qflare.crypto.signing import PublicKey, algorithm_of
from qflare.evidence.statements import StatementError, StatementMismatchError, check_masking_form
from qflare.evidence.unmasking import Masking, check_masked_update, masking_of
from qflare.tensors import Manifest
from qflare.tensors.elements import ElementRule
from qflare.tensors.encodings import Encoding, encoding_rules
from qflare.v1 import coordinator_service_pb2, security_pb2, tensor_pb2, training_pb2
from qflare_server.context import Context, UnprovenKeyError
from qflare_server.errors import (
    DigestMismatchError,
    GlobalModelNotFoundError,
    InvalidManifestError,
    InvalidRequestError,
    InvalidSealError,
    InvalidSignatureError,
    RoundNotOpenError,
    SealingMismatchError,
    StaleBaseVersionError,
    TrainingSessionNotFoundError,
)
from qflare_server.payloads.expected import ExpectedPayload, SealedArrival
from qflare_server.storage.repository import global_models, training_sessions
from qflare_server.training.masking import is_masked, update_manifest
from qflare_server.use_cases.access.statements import parse_statement
from qflare_server.use_cases.devices.keys import AcceptedAlgorithms

DIGEST = re.compile(r"[0-9a-f]{64}")
PAYLOAD = "header.statement.payload"
"""Path of an update statement in a request."""
STATEMENT = f"{PAYLOAD}."
"""Path of its fields."""
REMEMBERED_ROUNDS = 64
REMEMBERED_KEYS = 4096


@dataclass(frozen=True)
class Contributor:
    """The calling device, identified by its credential."""

    device_id: str
    key_id: str | None
    algorithm: int | None = None
    public_key: bytes | None = None


@dataclass(frozen=True)
class RoundFacts:
    """What a round expects of an update; immutable once the round is open."""

    training_session_id: str
    number: int
    base_version: int
    base_digest: str
    nonce: str
    manifest: Manifest
    """Layout of an update on the wire."""
    rules: Mapping[str, ElementRule]
    config: training_pb2.TrainingConfig
    selected_count: int
    """Devices selected; 0 means every eligible device."""
    masking: Masking | None = None
    """Masking that the round's signed task requires; None for none."""


@dataclass(frozen=True)
class Submission:
    """A checked header: an update that only lacks its payload.

    `statement_bytes` are the statement as the device sent it; None for a contribution of an embedding program, whose
    statement the coordinator has written itself.
    """

    statement: security_pb2.UpdateStatement
    statement_bytes: bytes | None
    statement_digest: str
    signature: bytes | None
    device: Contributor
    facts: RoundFacts
    expected: ExpectedPayload

    @property
    def is_in_process(self) -> bool:
        """Whether an embedding program vouches for the update."""
        return self.statement_bytes is None


class SubmissionValidator:
    """Validates update headers; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._algorithms = AcceptedAlgorithms(context.config)
        self._facts = lru_cache(maxsize=REMEMBERED_ROUNDS)(self._read_facts)

    def check(
        self, device: Contributor, header: coordinator_service_pb2.UpdateHeader
    ) -> Submission:
        """Check everything that can be checked without the payload.

        Raises:
            InvalidRequestError: Or a subclass: the header is invalid.
            RoundNotOpenError: The round has not been opened.
            StaleBaseVersionError: The base version is not the round's.
        """
        statement = parse_update(header)
        _check_statement(self._context.config.realm, device, statement)
        return self._check_parsed(
            device,
            header,
            statement,
            partial(self._check_signature, device, statement, header.statement),
        )

    def authenticate(
        self,
        device: Contributor,
        header: coordinator_service_pb2.UpdateHeader,
        statement: security_pb2.UpdateStatement,
    ) -> bytes:
        """Verify an update that nothing but its signature authenticates, before anything that it names is looked up.

        Args:
            device: The device that the statement names, with its current key.
            header: The header as received.
            statement: The statement in it.

        Returns:
            The signature, for `check_authenticated`.

        Raises:
            InvalidRequestError: The statement is of another realm.
            InvalidSignatureError: The update is not signed by the device's current key.
        """
        _check_statement(self._context.config.realm, device, statement)
        signature = None
        if header.statement.signatures:
            signature = self._check_signature(device, statement, header.statement)
        if signature is None:
            raise InvalidSignatureError("signatures: got 0, want 1")
        return signature

    def check_authenticated(
        self,
        device: Contributor,
        header: coordinator_service_pb2.UpdateHeader,
        statement: security_pb2.UpdateStatement,
        signature: bytes,
    ) -> Submission:
        """Check the rest of an update that `authenticate` has verified.

        Raises:
            QflareError: As `check`.
        """
        return self._check_parsed(device, header, statement, lambda: signature)

    def _check_parsed(
        self,
        device: Contributor,
        header: coordinator_service_pb2.UpdateHeader,
        statement: security_pb2.UpdateStatement,
        find_signature: Callable[[], bytes | None],
    ) -> Submission:
        facts = self._facts(statement.training_session_id, statement.round_number)
        _check_against_round(statement, facts)
        _check_masking(statement, facts)
        _check_sealing(header, statement, facts)
        _check_layout(statement, facts)
        signature = find_signature()
        expected = ExpectedPayload(
            facts.manifest,
            statement.payload_digest,
            header.chunk_digests,
            facts.rules,
            _sealed_arrival(header, statement) if statement.sealed else None,
        )
        expected.check(self._context.config.max_payload_bytes)
        _require_chunk_digests(expected)
        payload = header.statement.payload
        return Submission(
            statement,
            payload,
            hashlib.sha256(payload).hexdigest(),
            signature,
            device,
            facts,
            expected,
        )

    def _check_signature(
        self,
        device: Contributor,
        statement: security_pb2.UpdateStatement,
        envelope: security_pb2.SignedEnvelope,
    ) -> bytes | None:
        if not envelope.signatures and not self._context.config.require_signatures:
            return None
        if len(envelope.signatures) != 1:
            raise InvalidSignatureError(f"signatures: got {len(envelope.signatures)}, want 1")
        _check_binding(statement)
        if device.key_id is None or statement.key_id != device.key_id:
            raise InvalidSignatureError("key_id: it is not the device's current key")
        signature = envelope.signatures[0]
        key = _key(device.algorithm, device.public_key)
        self._algorithms.require(key.algorithm)
        require_identity(self._context, device.device_id, device.key_id, key)
        if signature.key_id != device.key_id or int(signature.algorithm) != key.algorithm:
            raise InvalidSignatureError("signature: made with another key or algorithm")
        try:
            self._context.signatures.verify(key, envelope.payload, signature.signature)
        except BadSignatureError as error:
            raise InvalidSignatureError("the update's signature does not verify") from error
        return signature.SerializeToString()

    def _read_facts(self, training_session_id: str, number: int) -> RoundFacts:
        with self._context.database.read() as session:
            return read_facts(session, training_session_id, number)


def parse_update(
    header: coordinator_service_pb2.UpdateHeader,
) -> security_pb2.UpdateStatement:
    """Return the statement of an update's header.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return parse_statement(security_pb2.UpdateStatement, header.statement.payload, PAYLOAD)


def read_facts(session: Session, training_session_id: str, number: int) -> RoundFacts:
    """Return what a round expects of an update.

    Raises:
        TrainingSessionNotFoundError: There is no such training session.
        RoundNotOpenError: The round has not been opened.
        GlobalModelNotFoundError: Its base version is missing.
    """
    training_session = training_sessions.get_session(session, training_session_id)
    if training_session is None:
        raise TrainingSessionNotFoundError
    current = training_sessions.get_round(session, training_session_id, number)
    if current is None:
        raise RoundNotOpenError(f"round {number} has not been opened")
    base = global_models.get_model(session, training_session_id, current.base_version)
    if base is None:
        raise GlobalModelNotFoundError
    manifest = Manifest.from_proto(tensor_pb2.Manifest.FromString(base.manifest))
    config = training_session.config
    return RoundFacts(
        training_session.id,
        number,
        current.base_version,
        base.digest,
        current.nonce,
        update_manifest(config, manifest),
        _element_rules(config, manifest),
        config,
        current.selected_count,
        _masking(current.task),
    )


def _element_rules(
    config: training_pb2.TrainingConfig, manifest: Manifest
) -> Mapping[str, ElementRule]:
    """Return the rules for the elements of an update; any number is an element of a masked one."""
    if is_masked(config):
        return {}
    return encoding_rules(manifest, Encoding.from_number(config.transfer.update_encoding))


def _masking(task: bytes | None) -> Masking | None:
    return None if task is None else masking_of(security_pb2.SignedEnvelope.FromString(task))


def require_identity(context: Context, device_id: str, key_id: str, key: PublicKey) -> None:
    """Check that signed evidence binds a key to the calling device.

    Args:
        context: The coordinator's components.
        device_id: The calling device.
        key_id: Key id in the device's row.
        key: The key.

    Raises:
        InvalidSignatureError: The row holds another key, or no signed evidence binds the key to the device.
    """
    try:
        context.identities.require(device_id, key.key_id)
    except UnprovenKeyError as error:
        raise InvalidSignatureError("key_id: nothing shows that the key is the device's") from error
    if key.key_id != key_id:
        raise InvalidSignatureError("key_id: it is not the id of the device's current key")


def contributor_key(contributor: Contributor) -> PublicKey:
    """Return the key of a device.

    Raises:
        InvalidSignatureError: It has none.
    """
    return _key(contributor.algorithm, contributor.public_key)


@lru_cache(maxsize=REMEMBERED_KEYS)
def _key(algorithm: int | None, data: bytes | None) -> PublicKey:
    """Return a device's key, loaded once."""
    if algorithm is None or data is None:
        raise InvalidSignatureError("key_id: the device has no key")
    return PublicKey(algorithm_of(algorithm), data)


def _check_statement(
    realm: str, device: Contributor, statement: security_pb2.UpdateStatement
) -> None:
    """Check the fields that need no lookup."""
    if statement.realm != realm:
        raise InvalidRequestError(
            f"realm: got {statement.realm[:64]!r}, want {realm!r}", field=f"{STATEMENT}realm"
        )
    if statement.device_id != device.device_id:
        raise InvalidRequestError(
            "device_id: it is not the calling device", field=f"{STATEMENT}device_id"
        )


def _check_binding(statement: security_pb2.UpdateStatement) -> None:
    """Check that the signature binds the bytes on the wire, so that a later verifier accepts no other update."""
    if not DIGEST.fullmatch(statement.payload_digest):
        raise InvalidRequestError(
            "payload_digest: want 64 hex digits", field=f"{STATEMENT}payload_digest"
        )
    if statement.sealed:
        return
    if statement.sealed_header_digest:
        raise InvalidRequestError(
            "sealed_header_digest: not sealed", field=f"{STATEMENT}sealed_header_digest"
        )
    if statement.wire_digest != statement.payload_digest:
        raise InvalidRequestError(
            "wire_digest: not the payload digest", field=f"{STATEMENT}wire_digest"
        )


def _check_masking(statement: security_pb2.UpdateStatement, facts: RoundFacts) -> None:
    """Require the masking of the round's task if, and only if, it has one.

    Raises:
        InvalidRequestError: Names the field.
    """
    try:
        check_masking_form(statement)
        if facts.masking is not None:
            check_masked_update(statement, facts.masking)
    except StatementMismatchError as error:
        raise InvalidRequestError(
            f"{error.field}: not that of the round's task", field=f"{STATEMENT}masking"
        ) from error
    except StatementError as error:
        raise InvalidRequestError(str(error), field=f"{STATEMENT}masking") from error


def _check_sealing(
    header: coordinator_service_pb2.UpdateHeader,
    statement: security_pb2.UpdateStatement,
    facts: RoundFacts,
) -> None:
    """Require a sealed update if, and only if, the training session asks for sealing."""
    wanted = facts.config.transfer.sealed
    if statement.sealed != wanted or header.HasField("sealed") != wanted:
        words = {True: "sealed", False: "not sealed"}
        got = statement.sealed if statement.sealed != wanted else header.HasField("sealed")
        raise SealingMismatchError(
            f"sealed: got an update that is {words[got]}, want one that is {words[wanted]}",
            field="sealed",
        )


def _check_layout(statement: security_pb2.UpdateStatement, facts: RoundFacts) -> None:
    """Check the payload's layout against the round's."""
    wanted = facts.manifest
    if statement.layout_digest != wanted.layout_digest:
        raise InvalidManifestError(
            f"layout digest: got {statement.layout_digest}, want {wanted.layout_digest}",
            field=f"{STATEMENT}layout_digest",
        )
    if statement.size_bytes != wanted.size_bytes:
        raise InvalidManifestError(
            f"size_bytes: got {statement.size_bytes}, want {wanted.size_bytes}",
            field=f"{STATEMENT}size_bytes",
        )


def _require_chunk_digests(expected: ExpectedPayload) -> None:
    """Require chunk digests for a payload of several chunks, so that each is checked on arrival."""
    count = expected.wire_chunk_count
    if count > 1 and not expected.chunk_digests:
        raise DigestMismatchError(
            f"chunk_digests: got none, want {count}", field="header.chunk_digests"
        )


def _sealed_arrival(
    header: coordinator_service_pb2.UpdateHeader, statement: security_pb2.UpdateStatement
) -> SealedArrival:
    """Check the form and the context of a sealed payload's header; its key is not opened."""
    for name in ("payload_digest", "wire_digest", "sealed_header_digest"):
        if not DIGEST.fullmatch(getattr(statement, name)):
            raise InvalidRequestError(f"{name}: want 64 hex digits", field=STATEMENT + name)
    sealed = header.sealed
    sizes = [len(wrapped.sealed_key) for wrapped in sealed.wrapped_keys]
    if sizes != [WRAPPED_KEY_BYTES]:
        raise InvalidSealError(
            f"wrapped_keys: got {len(sizes)}, want 1 of {WRAPPED_KEY_BYTES} bytes",
            field="header.sealed",
        )
    seal_context = SealContext.from_update(statement)
    try:
        check_header(sealed.header, seal_context)
    except UnsealError as error:
        raise InvalidSealError(f"sealed: {error}", field="header.sealed") from error
    if hashlib.sha256(sealed.header).hexdigest() != statement.sealed_header_digest:
        raise InvalidSealError("sealed: not the header that was signed", field="header.sealed")
    return SealedArrival(sealed, seal_context, statement.wire_digest)


def _check_against_round(statement: security_pb2.UpdateStatement, facts: RoundFacts) -> None:
    if statement.base_version != facts.base_version:
        raise StaleBaseVersionError(statement.base_version, facts.base_version)
    if statement.base_digest != facts.base_digest:
        raise InvalidRequestError(
            "base_digest: not the digest of the base version", field=f"{STATEMENT}base_digest"
        )
    if statement.task_nonce != facts.nonce:
        raise InvalidRequestError(
            "task_nonce: not the nonce of the round's task", field=f"{STATEMENT}task_nonce"
        )
    transfer = facts.config.transfer
    kind = statement.kind or training_pb2.UPDATE_KIND_WEIGHTS
    encoding = statement.encoding or training_pb2.ENCODING_NONE
    if (kind, encoding) != (transfer.update_kind, transfer.update_encoding):
        raise InvalidRequestError(
            "kind or encoding: not those of the training session", field=f"{STATEMENT}encoding"
        )
    base_encoding = statement.base_encoding or training_pb2.ENCODING_NONE
    wanted = transfer.download_encoding or training_pb2.ENCODING_NONE
    if base_encoding != wanted:
        got, want = (training_pb2.Encoding.Name(number) for number in (base_encoding, wanted))
        raise InvalidRequestError(
            f"base_encoding: got {got}, want {want}: train from the version as it is downloaded",
            field=f"{STATEMENT}base_encoding",
        )
