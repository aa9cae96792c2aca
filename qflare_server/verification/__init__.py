"""Read-only verification of a database against the signed statements.

`verify_database` compares the audit log, device keys, versions, updates, rounds, evaluations and all payloads with the
signed statements; `find` yields the findings one by one. `recompute_version` recomputes a version from its updates. All
three read in bounded memory and may run beside a coordinator.

Trust is rooted in the pinned ids of the root keys. An attacker with both the online keys and the database can write a
consistent false history; only the tree heads of a witness and the state kept by devices reveal it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from qflare_server.context import Context
from qflare_server.keys.device_identities import DeviceIdentities
from qflare_server.verification.audit_log import AuditVerification
from qflare_server.verification.contents import ContentVerification
from qflare_server.verification.devices import DeviceVerification
from qflare_server.verification.downloads import DownloadVerification
from qflare_server.verification.evaluations import EvaluationVerification
from qflare_server.verification.findings import (
    NO_KEYS,
    Finding,
    PublishedRegistrars,
    Tally,
    read_signer_keys,
)
from qflare_server.verification.recomputation import Recomputation, recompute_version
from qflare_server.verification.records import RecordVerification
from qflare_server.verification.rounds import RoundVerification

__all__ = [
    "DatabaseReport",
    "Finding",
    "Recomputation",
    "Tally",
    "find",
    "recompute_version",
    "verify_database",
]

MAX_FINDINGS: Final = 1000
"""Maximum number of findings in a report."""


@dataclass(frozen=True)
class DatabaseReport:
    """Result of the verification of a database.

    Attributes:
        findings: Discrepancies, at most `MAX_FINDINGS`.
        checked: Number of records checked, by kind.
        unchecked: Number of records that could not be checked, by reason.
    """

    findings: tuple[Finding, ...]
    checked: Mapping[str, int]
    unchecked: Mapping[str, int]


def verify_database(
    context: Context,
    root_key_ids: Collection[str],
    *,
    root_threshold: int | None = None,
    read_bytes: bool = True,
    witness_file: Path | None = None,
) -> DatabaseReport:
    """Verify a whole database.

    Args:
        context: The coordinator's dependencies.
        root_key_ids: Pinned ids of the keys of root document 1, 64 hex digits each.
        root_threshold: Number of them that must have signed; None means all.
        read_bytes: Also hash the bytes of all models and updates.
        witness_file: Tree heads kept by a witness; None without one.

    Raises:
        StoreUnavailableError: The database cannot be reached.
    """
    tally = Tally()
    found = find(
        context,
        root_key_ids,
        root_threshold=root_threshold,
        read_bytes=read_bytes,
        witness_file=witness_file,
        tally=tally,
    )
    findings = tuple(islice(found, MAX_FINDINGS))
    return DatabaseReport(findings, dict(tally.checked), dict(tally.unchecked))


def find(
    context: Context,
    root_key_ids: Collection[str],
    *,
    root_threshold: int | None = None,
    read_bytes: bool = True,
    witness_file: Path | None = None,
    tally: Tally,
) -> Iterator[Finding]:
    """Yield discrepancies, and count into `tally`; other arguments as for `verify_database`."""
    keys = NO_KEYS
    try:
        keys = read_signer_keys(context, root_key_ids, root_threshold)
    except ValueError as error:
        yield Finding("keyset", "in force", str(error))
    registrars = PublishedRegistrars(keys)
    identities = DeviceIdentities(context.database, context.config.realm, registrars)
    passes = {
        "audit": AuditVerification(context, keys, tally, witness_file).findings(),
        "device": DeviceVerification(context, identities, tally).findings(),
        "record": RecordVerification(context, keys, identities, tally).findings(),
        "round": RoundVerification(context, keys, tally).findings(),
        "evaluation": EvaluationVerification(context, identities, tally).findings(),
        "payload": ContentVerification(context, tally, read_bytes=read_bytes).findings(),
        "download": DownloadVerification(context, tally, read_bytes=read_bytes).findings(),
    }
    for kind, found in passes.items():
        yield from _readable(kind, found)


def _readable(kind: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings; a row that cannot be read, such as one with invalid JSON, is a finding that ends the pass."""
    try:
        yield from found
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        yield Finding(kind, "row", f"it cannot be read: {type(error).__name__}: {error}")
