"""Signatures that outlive their keys: what devices are still shown is signed anew before its key leaves the keyset.

A device accepts tasks and versions only from keys of the keyset in force, which has room for few keys of each role. A
round or a version may last longer. So the process that publishes a keyset signs with its newest key what devices may
still be shown and a key has signed that leaves with the keyset after it. The signed bytes stay, and with them the
digests. Heads of the audit log need no renewal, because each published keyset is an entry and so leads to a new head,
at once if the key of the latest is gone; receipts are shown with the keysets of their time.

Of tasks, a keyset names two keys. What a replica has signed with the earlier one since the publication, because it
lacked the newest or committed late, is signed anew by each coordinator once a minute. Versions need no such pass: their
keys stay for eight further publications, each of which finds them.

Invariant: what gets a new signature has a valid one by a key that is in the previous and in the next keyset, or left it
for lack of room. What a withdrawn key signed is never signed anew: whoever stole it may have signed it.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from qflare.crypto.envelope import open_envelope, sign_envelope
from qflare.crypto.signing import InvalidSignatureError, PublicKey
from qflare.v1 import security_pb2
from qflare_server.keys.held_keys import CONTEXTS, HeldKeys
from qflare_server.keys.ring import KeyProvider, Role
from qflare_server.keys.trust_documents import Trust, most_keys
from qflare_server.storage.database import Database
from qflare_server.storage.records import Replacement
from qflare_server.storage.repository import global_models, training_sessions

logger = logging.getLogger(__name__)

BATCH: Final = 200
"""Versions that are read at once."""


@dataclass(frozen=True)
class Renewals:
    """Signatures that take the place of earlier ones.

    Attributes:
        tasks: Of rounds.
        versions: Of versions.
    """

    tasks: Sequence[Replacement]
    versions: Sequence[Replacement]

    def write(self, session: Session) -> None:
        """Write all of them, except where another process was faster."""
        for task in self.tasks:
            training_sessions.replace_task(session, task)
        for version in self.versions:
            global_models.replace_signature(session, version)


class _Renewer:
    """Signs anew what the keys of one role have signed that leave the keyset.

    Args:
        role: The role.
        keys: Those that are held.
        previous: The documents in force.
        wanted: Those that are about to be published.
        withdrawn: Ids of keys that count no longer; None if that is not known.
    """

    def __init__(
        self,
        role: Role,
        keys: HeldKeys,
        previous: Trust,
        wanted: Trust,
        withdrawn: Collection[str] | None,
    ) -> None:
        self._context = CONTEXTS[role]
        held, named = keys.signers, wanted.key_ids(role)
        leaving = wanted.signature_keys(role)[most_keys(role) - 1 :]
        if withdrawn is not None:
            gone = {*named, *withdrawn}
            leaving += [key for key in previous.signature_keys(role) if key.key_id not in gone]
        self.leaving: dict[str, PublicKey] = {key.key_id: key for key in leaving}
        fit = (held[key_id] for key_id in named if key_id in held and key_id not in self.leaving)
        self._signer = next(fit, None)
        if self.leaving and self._signer is None:
            logger.warning("no newer key is held here: signatures of %s stay", self._context)

    def renewed(self, envelope: security_pb2.SignedEnvelope) -> security_pb2.SignedEnvelope | None:
        """Return the same bytes with another signature; None if the present one stays."""
        signers = {signature.key_id for signature in envelope.signatures}
        if self._signer is None or signers.isdisjoint(self.leaving):
            return None
        try:
            open_envelope(envelope, self._context, self.leaving.values())
        except InvalidSignatureError as error:
            logger.warning("not signed anew, %s: %s", self._context, error)
            return None
        return sign_envelope(self._signer, self._context, envelope.payload)


def find_renewals(
    database: Database,
    provider: KeyProvider,
    previous: Trust,
    wanted: Trust,
    withdrawn: Collection[str] | None,
) -> Renewals:
    """Sign anew what needs it, outside of any transaction.

    Args:
        database: Holds tasks and versions.
        provider: Holds the keys.
        previous: The documents in force.
        wanted: Those that are about to be published.
        withdrawn: Ids of keys that count no longer; None if that is not known, so that what a key has signed that
            `wanted` does not name keeps its signature.

    Returns:
        What to write in the transaction that publishes the documents.
    """
    keys = HeldKeys(provider)

    def renewer(role: Role) -> _Renewer:
        return _Renewer(role, keys, previous, wanted, withdrawn)

    tasks = list(_tasks(database, renewer(security_pb2.KEY_ROLE_TASK)))
    versions = list(_versions(database, renewer(security_pb2.KEY_ROLE_MODEL)))
    return Renewals(tasks, versions)


def renew_tasks(database: Database, keys: HeldKeys, trust: Trust) -> int:
    """Sign anew the tasks of rounds in progress whose key leaves with the keyset after that in force.

    Args:
        database: Holds the tasks.
        keys: Those that are held.
        trust: The documents in force.

    Returns:
        How many got another signature.
    """
    found = list(_tasks(database, _Renewer(security_pb2.KEY_ROLE_TASK, keys, trust, trust, ())))
    if found:
        database.write(Renewals(found, ()).write)
    return len(found)


def _tasks(database: Database, renewer: _Renewer) -> Iterator[Replacement]:
    """Renew the tasks of rounds in progress."""
    if not renewer.leaving:
        return
    with database.read() as session:
        rows = training_sessions.tasks_in_progress(session)
    for session_id, number, task in rows:
        envelope = _parsed(task)
        renewed = envelope and renewer.renewed(envelope)
        if renewed:
            yield Replacement(session_id, number, task, renewed.SerializeToString())


def _versions(database: Database, renewer: _Renewer) -> Iterator[Replacement]:
    """Renew the statements of versions: devices and auditors follow the chain from the first on."""
    after = ("", -1)
    while renewer.leaving:
        with database.read() as session:
            rows = global_models.signatures_after(session, after, BATCH)
        yield from _renewed_versions(rows, renewer)
        if len(rows) < BATCH:
            return
        after = rows[-1].training_session_id, rows[-1].version


def _renewed_versions(
    rows: Sequence[global_models.StoredSignature], renewer: _Renewer
) -> Iterator[Replacement]:
    for row in rows:
        envelope = _parsed(row.signature)
        if envelope is None:
            continue
        envelope.payload = row.statement  # that of the row counts, as for devices
        renewed = renewer.renewed(envelope)
        if renewed:
            signature = renewed.SerializeToString()
            yield Replacement(row.training_session_id, row.version, row.signature, signature)


def _parsed(data: bytes) -> security_pb2.SignedEnvelope | None:
    try:
        return security_pb2.SignedEnvelope.FromString(data)
    except DecodeError:
        logger.warning("a signature in the database is damaged and is not renewed")
        return None
