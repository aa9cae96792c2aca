"""Offline verification of the two kinds of evidence: verification bundles and evidence files.

* A *bundle* (``qflare.v1.VerificationBundle``, binary) is exported from a coordinator by an auditor: one
  version with all its updates, device keys and entries of the audit log.
* An *evidence file* (JSON, `qflare_client.trust.evidence`) is collected by a device: a history of versions, with the
  device's own updates in them.

It makes no calls and reads no clock.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from google.protobuf.message import DecodeError

from qflare.evidence.verification import Report, verify_bundle, verify_payload
from qflare.tensors.manifest import InvalidManifestError
from qflare.tensors.safetensors_files import import_safetensors
from qflare.v1 import verification_pb2
from qflare_client.errors import InvalidEvidenceError
from qflare_client.trust.evidence import Evidence, verify


def verify_file(
    path: Path,
    *,
    root_key_ids: Sequence[str],
    threshold: int,
    reference_time: datetime,
    model: Path | None = None,
) -> list[str]:
    """Verify a file and return the verified facts, one sentence each.

    Args:
        path: A verification bundle or an evidence file.
        root_key_ids: Ids of the keys of root document 1, from a trusted source.
        threshold: Required number of root signatures.
        reference_time: Time at which the keys must be valid, timezone-aware.
        model: A ``.safetensors`` file to compare with the last version.

    Raises:
        InvalidEvidenceError: The file cannot be read, or some part of it does not verify.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidEvidenceError(str(error)) from error
    if data.startswith(b"{"):
        return verify(
            Evidence.from_json(data),
            root_key_ids=root_key_ids,
            threshold=threshold,
            reference_time=reference_time,
            model=model,
        )
    try:
        bundle = verification_pb2.VerificationBundle.FromString(data)
        report = verify_bundle(bundle, root_key_ids, reference_time, root_threshold=threshold)
        if model is not None:
            verify_payload(report, import_safetensors(model).chunks())
    except (ValueError, DecodeError, InvalidManifestError, OSError) as error:
        raise InvalidEvidenceError(str(error)) from error
    return list(_sentences(report, model))


def _sentences(report: Report, model: Path | None) -> Iterator[str]:
    yield (
        f"keyset {report.keyset_version} of realm {report.realm} "
        f"is signed by root {report.root_version}"
    )
    yield (
        f"versions 0 to {report.version} are signed and follow each other, from the initial model "
        f"on; version {report.version} is {report.digest}"
    )
    yield f"the audit log of {report.log_size} entries says that it was signed"
    if report.contributor_count:
        yield f"it was made from these {report.contributor_count} updates alone"
        yield (
            f"{report.signed_count} of them are signed by {report.device_count} devices, "
            "with keys that they enrolled or rotated to"
        )
    if report.helper_ids:
        yield (
            "the coordinator got only the sum of these updates, with the signed answers of "
            f"helper {', '.join(report.helper_ids)}"
        )
    if model is not None:
        yield f"{model} is version {report.version}, byte by byte"
    for gap in report.missing:
        yield f"not shown: {gap}"
