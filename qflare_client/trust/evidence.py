"""Offline verification of evidence: a version, its history, and its updates.

An evidence file is a JSON object with these members; messages are in their proto3 JSON form:

* ``format``: ``"qflare-evidence-1"``,
* ``realm``, ``training_session_id``: text,
* ``keyset``: ``KeysetBundle`` with all root documents,
* ``statements``: ``SignedEnvelope`` of each version, consecutive, ascending,
* ``updates``: objects with ``statement`` (``SignedEnvelope``), ``public_key`` (``PublicKey`` of the
  device), ``version``, ``proof`` (``InclusionProof``) and, optionally, ``enrollment_receipt``
  (``SignedEnvelope``), which ties the key to the device.

`verify` trusts only the given root key ids. It raises an error at the first fault, and otherwise returns the verified
facts.

It does not read a database (see ``qflare-server verify``), and cannot prove that training was honest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from qflare.crypto.envelope import open_envelope
from qflare.crypto.signing import PublicKey, SigningContext
from qflare.evidence.lineage import (
    ModelVersion,
    contributors_digest,
    verify_chain,
    verify_contribution,
)
from qflare.evidence.statements import digest_of, open_update, require_equal
from qflare.protocol.keysets import KeyRole, TrustedKeyset
from qflare.tensors import payload_digest
from qflare.tensors.download_encodings import narrowed
from qflare.tensors.encodings import Encoding
from qflare.tensors.safetensors_files import import_safetensors
from qflare.v1 import security_pb2
from qflare_client.errors import InvalidEvidenceError

M = TypeVar("M", bound=Message)

_FORMAT = "qflare-evidence-1"
_MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    json_format.ParseError,
)
"""What reading of JSON of another shape raises."""


@dataclass(frozen=True)
class UpdateEvidence:
    """An update with the proof that it is in a version."""

    statement: security_pb2.SignedEnvelope
    """The device's statement."""

    public_key: security_pb2.PublicKey
    """Public key of the device."""

    version: int
    """Version that contains it."""

    proof: security_pb2.InclusionProof
    """Path from the update to the version's contributors digest."""

    enrollment_receipt: security_pb2.SignedEnvelope | None = None
    """Enrollment receipt that ties the key to the device; None leaves this unverified."""


@dataclass(frozen=True)
class Evidence:
    """Contents of an evidence file."""

    realm: str
    """Name of the deployment."""

    training_session_id: str
    """Training session, a UUID."""

    keyset: security_pb2.KeysetBundle
    """All root documents and the keyset."""

    statements: Sequence[security_pb2.SignedEnvelope]
    """Statements of consecutive versions, ascending; at least one."""

    updates: Sequence[UpdateEvidence] = field(default_factory=tuple)
    """Updates."""

    def to_json(self) -> str:
        """Return the text of the evidence file."""
        document = {
            "format": _FORMAT,
            "realm": self.realm,
            "training_session_id": self.training_session_id,
            "keyset": json_format.MessageToDict(self.keyset),
            "statements": [json_format.MessageToDict(entry) for entry in self.statements],
            "updates": [_update_to_dict(update) for update in self.updates],
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Evidence":
        """Parse the text of an evidence file, without verifying it.

        Raises:
            InvalidEvidenceError: It is not an evidence file.
        """
        try:
            document = json.loads(text)
            if document["format"] != _FORMAT:
                raise InvalidEvidenceError(
                    f"format: want {_FORMAT}; if a later release made it, upgrade qflare"
                )
            return cls(
                realm=str(document["realm"]),
                training_session_id=str(document["training_session_id"]),
                keyset=_parse(document["keyset"], security_pb2.KeysetBundle),
                statements=[
                    _parse(entry, security_pb2.SignedEnvelope) for entry in document["statements"]
                ],
                updates=[_update_from_dict(entry) for entry in document["updates"]],
            )
        except _MALFORMED as error:
            raise InvalidEvidenceError(
                f"no file of evidence: {error!r}; if a later release made it, upgrade qflare"
            ) from error


def _update_to_dict(update: UpdateEvidence) -> dict[str, Any]:
    entry = {
        "statement": json_format.MessageToDict(update.statement),
        "public_key": json_format.MessageToDict(update.public_key),
        "version": update.version,
        "proof": json_format.MessageToDict(update.proof),
    }
    if update.enrollment_receipt is not None:
        entry["enrollment_receipt"] = json_format.MessageToDict(update.enrollment_receipt)
    return entry


def _update_from_dict(entry: Mapping[str, Any]) -> UpdateEvidence:
    receipt = entry.get("enrollment_receipt")
    return UpdateEvidence(
        statement=_parse(entry["statement"], security_pb2.SignedEnvelope),
        public_key=_parse(entry["public_key"], security_pb2.PublicKey),
        version=int(entry["version"]),
        proof=_parse(entry["proof"], security_pb2.InclusionProof),
        enrollment_receipt=receipt and _parse(receipt, security_pb2.SignedEnvelope),
    )


def _parse(entry: dict[str, Any], kind: type[M]) -> M:
    return json_format.ParseDict(entry, kind())


def verify(
    evidence: Evidence,
    *,
    root_key_ids: Sequence[str],
    threshold: int,
    reference_time: datetime,
    model: Path | None = None,
) -> list[str]:
    """Verify evidence and return the verified facts, one sentence each.

    Args:
        evidence: The evidence.
        root_key_ids: Ids of the keys of root document 1, from a trusted source.
        threshold: Required number of root signatures.
        reference_time: Time at which the keys must be valid, timezone-aware.
        model: A ``.safetensors`` file to compare with the last version.

    Raises:
        InvalidEvidenceError: Some part of the evidence does not verify.
    """
    try:
        return _verify(evidence, frozenset(root_key_ids), threshold, reference_time, model)
    except (ValueError, DecodeError, OSError) as error:
        raise InvalidEvidenceError(str(error)) from error


def _verify(
    evidence: Evidence,
    root_key_ids: frozenset[str],
    threshold: int,
    reference_time: datetime,
    model: Path | None,
) -> list[str]:
    pins = TrustedKeyset(evidence.realm, root_key_ids, threshold)
    trusted = pins.updated(evidence.keyset, reference_time)
    realm, root_version = evidence.realm, trusted.root_version
    shown = [f"keyset {trusted.keyset_version} of realm {realm} is signed by root {root_version}"]
    versions = verify_chain(
        evidence.statements,
        trusted.signature_keys(KeyRole.MODEL, reference_time),
        realm=evidence.realm,
        training_session_id=evidence.training_session_id,
    )
    if not versions:
        raise ValueError("the evidence has no statement of a version")
    shown.append(_about_versions(versions))
    shown += _about_updates(evidence, versions, trusted, reference_time)
    if model is not None:
        shown.append(_about_model(versions[-1], model))
    return shown


def _about_versions(versions: Sequence[ModelVersion]) -> str:
    first, last = versions[0].statement.version, versions[-1].statement.version
    whole = "from the initial model on" if first == 0 else "its beginning is not in the evidence"
    return (
        f"versions {first} to {last} are signed and follow each other, {whole}; "
        f"version {last} is {versions[-1].digest}"
    )


def _about_updates(
    evidence: Evidence,
    versions: Sequence[ModelVersion],
    trusted: TrustedKeyset,
    reference_time: datetime,
) -> list[str]:
    by_number = {version.statement.version: version for version in versions}
    registrars = trusted.signature_keys(KeyRole.REGISTRAR, reference_time)
    shown = []
    for update in evidence.updates:
        version = by_number.get(update.version)
        if version is None:
            raise ValueError(f"an update is in version {update.version}, which has no statement")
        shown.append(_about_update(evidence, update, version, registrars))
    return shown + _about_completeness(evidence, versions)


def _about_update(
    evidence: Evidence,
    update: UpdateEvidence,
    version: ModelVersion,
    registrars: Sequence[PublicKey],
) -> str:
    statement = open_update(update.statement, PublicKey.from_proto(update.public_key))
    require_equal("realm", statement.realm, evidence.realm)
    require_equal(
        "training_session_id", statement.training_session_id, evidence.training_session_id
    )
    verify_contribution(version.statement, update.statement.payload, update.proof)
    known = "with a key that no receipt ties to it"
    if update.enrollment_receipt is not None:
        payload = open_envelope(update.enrollment_receipt, SigningContext.RECEIPT, registrars)
        receipt = security_pb2.EnrollmentReceipt.FromString(payload)
        require_equal("realm", receipt.realm, evidence.realm)
        require_equal("device_id", receipt.device_id, statement.device_id)
        require_equal("signature_key_id", receipt.signature_key_id, statement.key_id)
        known = "with the key that it enrolled"
    return (
        f"update {statement.update_id} is in version {version.statement.version}; "
        f"device {statement.device_id} signed it {known}"
    )


def _about_completeness(evidence: Evidence, versions: Sequence[ModelVersion]) -> list[str]:
    shown = []
    for version in versions:
        number = version.statement.version
        digests = [
            digest_of(update.statement.payload)
            for update in evidence.updates
            if update.version == number
        ]
        if digests and contributors_digest(digests) == version.statement.contributors_digest:
            shown.append(f"version {number} was made from these {len(digests)} updates alone")
    return shown


def _about_model(version: ModelVersion, path: Path) -> str:
    file = import_safetensors(path)
    statement = version.statement
    require_equal("layout_digest", file.manifest.layout_digest, statement.layout_digest)
    if payload_digest(file.chunks()) == statement.payload_digest:
        return f"{path} is version {statement.version}, byte by byte"
    require_equal("payload_digest", True, statement.HasField("download"))
    encoding = Encoding.from_number(statement.download.encoding)
    smaller = payload_digest(narrowed(file.manifest, encoding, file.chunks()))
    require_equal("payload_digest", smaller, statement.download.payload_digest)
    return f"{path} is version {statement.version} as devices get it, in {encoding.name.lower()}"
