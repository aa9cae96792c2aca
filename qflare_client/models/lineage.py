"""Model lineage: verifies the history of a global model.

`check_header` decides whether the device accepts an offered version: it must be the requested one, signed by the
coordinator, and linked by a chain of signed statements to the last accepted version.

It does not verify signatures or chains itself (see `qflare_client.trust.keyset`), and reads no payload bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qflare.crypto.sealing import KemKey
from qflare.evidence.lineage import ModelVersion, verify_contribution
from qflare.evidence.statements import StatementError
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_client.errors import CorruptModelError, InvalidStatementError, RolledBackModelError
from qflare_client.keystore.identity import Identity
from qflare_client.models.accepted_versions import AcceptedVersions
from qflare_client.models.download import Download, GlobalModel, ProgressHook
from qflare_client.models.upload import Receipt
from qflare_client.rpc.caller import Calls
from qflare_client.tasks import Task, TaskKind
from qflare_client.trust.evidence import UpdateEvidence
from qflare_client.trust.keyset import Trust


@dataclass(frozen=True)
class Version:
    """A version in the verified history of a global model."""

    statement: security_pb2.ModelStatement
    """The signed statement."""

    digest: str
    """SHA-256 of the statement's bytes, 64 hex digits; identifies the version."""

    envelope: security_pb2.SignedEnvelope
    """The statement as received, with its signatures, as evidence."""


def read_lineage(
    calls: Calls,
    trust: Trust,
    training_session_id: str,
    first_version: int = 0,
    last_version: int | None = None,
    timeout_s: float | None = None,
) -> list[Version]:
    """Fetch and verify consecutive versions, at most 1,000.

    Raises:
        VerificationError: One is not signed, missing, or does not name its predecessor.
        QflareClientError: The call failed.
    """
    request = messages.GetLineageRequest(
        training_session_id=training_session_id,
        first_version=first_version,
        last_version=last_version,
    )
    answer = calls.unary(calls.transport.stub.GetLineage, request, timeout_s=timeout_s)
    versions = trust.follow(answer.statements, training_session_id, None)
    if versions and versions[0].statement.version != first_version:
        raise RolledBackModelError(
            f"got version {versions[0].statement.version}, want {first_version}"
        )
    return [
        Version(version.statement, version.digest, envelope)
        for version, envelope in zip(versions, answer.statements, strict=True)
    ]


def read_statements(
    calls: Calls, trust: Trust, training_session_id: str
) -> list[security_pb2.SignedEnvelope]:
    """Fetch and verify the statements of all versions.

    Raises:
        VerificationError: As `read_lineage`.
        QflareClientError: The call failed.
    """
    statements: list[security_pb2.SignedEnvelope] = []
    while page := read_lineage(calls, trust, training_session_id, len(statements)):
        statements += [version.envelope for version in page]
    return statements


def read_contribution(
    calls: Calls,
    trust: Trust,
    identity: Identity,
    receipt: Receipt,
    timeout_s: float | None = None,
) -> UpdateEvidence:
    """Fetch and verify the proof that an update of this device is in a version.

    Raises:
        VerificationError: The proof does not lead from the update to the signed version.
        QflareClientError: The call failed.
    """
    request = messages.GetContributionProofRequest(update_id=receipt.update_id)
    answer = calls.unary(calls.transport.stub.GetContributionProof, request, timeout_s=timeout_s)
    version = trust.open_model(answer.statement, receipt.training_session_id)
    try:
        verify_contribution(version.statement, receipt.statement.payload, answer.proof)
    except StatementError as error:
        raise InvalidStatementError(f"contribution proof: {error}") from error
    return UpdateEvidence(
        statement=receipt.statement,
        public_key=identity.keys.signing.public.to_proto(),
        version=version.statement.version,
        proof=answer.proof,
        enrollment_receipt=_receipt_for_current_key(identity),
    )


def _receipt_for_current_key(identity: Identity) -> security_pb2.SignedEnvelope | None:
    """Return the enrollment receipt, unless the device has rotated its keys since."""
    envelope = security_pb2.SignedEnvelope.FromString(bytes.fromhex(identity.receipt))
    receipt = security_pb2.EnrollmentReceipt.FromString(envelope.payload)
    current = receipt.signature_key_id == identity.keys.signing.public.key_id
    return envelope if current else None


def check_header(
    calls: Calls,
    trust: Trust,
    header: messages.GlobalModelHeader,
    request: messages.GetGlobalModelRequest,
    last: ModelVersion | None,
) -> ModelVersion:
    """Verify the header of a version: statement, number and history.

    Args:
        calls: Authenticated calls, for links that do not fit into the header.
        trust: Keyset of the coordinator.
        header: The received header.
        request: The request. An earlier version is accepted only if requested by number.
        last: Last accepted version; None accepts any version.

    Raises:
        CorruptModelError: It is not the requested version.
        RolledBackModelError: It is older than the last accepted one, or has another history.
        InvalidStatementError: A statement is not signed by the coordinator.
    """
    session_id = request.training_session_id
    version = trust.open_model(header.statement, session_id)
    number = version.statement.version
    if request.HasField("version") and number != request.version:
        raise CorruptModelError(f"got version {number}, want {request.version}")
    if last is None or (request.HasField("version") and number < last.statement.version):
        return version
    if number < last.statement.version:
        raise RolledBackModelError(
            f"got version {number}, have accepted version {last.statement.version} before"
        )
    links = list(_links(calls, header, session_id, last.statement.version + 1, number))
    return trust.follow([*links, header.statement], session_id, last)[-1]


def fetch(
    calls: Calls,
    trust: Trust,
    versions: AcceptedVersions,
    request: messages.GetGlobalModelRequest,
    progress: ProgressHook,
    *,
    kem_key: Callable[[], KemKey],
    timeout_s: float | None = None,
) -> GlobalModel:
    """Download a version that follows the last accepted one, and record it as accepted.

    Args:
        calls: Authenticated calls.
        trust: Keyset of the coordinator.
        versions: The versions accepted so far.
        request: The request.
        progress: Called with the number of received bytes.
        kem_key: Returns the device's KEM key, which decrypts sealed versions.
        timeout_s: Deadline of each attempt, in seconds; None means the calls' own.

    Raises:
        VerificationError: It does not follow the last accepted version, or does not match its statement.
        QflareClientError: The call failed.
    """
    last = versions.last(request.training_session_id, released=request.released)
    if last is not None:
        request.known_version = last.statement.version
    download = Download(
        calls,
        request,
        lambda header: check_header(calls, trust, header, request, last),
        progress,
        kem_key,
    )
    model = download.run(timeout_s)
    versions.accept(ModelVersion(model.statement, model.digest), released=request.released)
    return model


def _links(
    calls: Calls,
    header: messages.GlobalModelHeader,
    training_session_id: str,
    first_version: int,
    version: int,
) -> Iterator[security_pb2.SignedEnvelope]:
    """Yield the statements from one version up to another, exclusive: a header holds 1,000 at most."""
    wanted_count = version - first_version
    links = list(header.links[: max(0, wanted_count)])
    while links:
        yield from links
        wanted_count -= len(links)
        if wanted_count <= 0:
            return
        request = messages.GetLineageRequest(
            training_session_id=training_session_id,
            first_version=version - wanted_count,
            last_version=version - 1,
        )
        links = list(calls.unary(calls.transport.stub.GetLineage, request).statements)


def check_not_older(last: ModelVersion | None, task: Task) -> None:
    """Check that a training task does not start from a version older than the last accepted one.

    Raises:
        RolledBackModelError: The base version is older.
    """
    if last is not None and task.base_version < last.statement.version:
        raise RolledBackModelError(
            f"the task starts from version {task.base_version}, "
            f"have accepted version {last.statement.version} before"
        )


def check_sealing(task: Task, statement: security_pb2.ModelStatement) -> None:
    """Check that a version is sealed if the signed task states that the training session seals payloads.

    Raises:
        CorruptModelError: The version is not sealed.
    """
    if task.kind is TaskKind.TRAIN and task.transfer.sealed and not statement.sealed:
        raise CorruptModelError("the version is not sealed, the task says that payloads are")


def check_base(task: Task, digest: str) -> None:
    """Check that a version's digest is the one that a task names.

    Raises:
        RolledBackModelError: The digests differ.
    """
    if digest != task.base_digest:
        raise RolledBackModelError(
            f"version {task.base_version} has digest {digest}, the task names {task.base_digest}"
        )
