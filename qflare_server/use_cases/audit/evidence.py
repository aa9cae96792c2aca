"""Verification bundles: the evidence behind a version, for an offline verifier that trusts only the root keys.

A bundle is exported in parts of bounded size; their concatenated serializations are the bundle.
`qflare.evidence.verification` documents its contents and the order of the checks.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.evidence.audit_entries import Entry
from qflare.evidence.neighbor_transcripts import transcript_parts
from qflare.evidence.verification import EVALUATION_REPORTED, UPDATE_ACCEPTED, VERSION_SIGNED
from qflare.times import timestamp_of
from qflare.v1 import security_pb2, verification_pb2
from qflare_server.context import Context
from qflare_server.keys.device_identities import key_evidence
from qflare_server.storage.records import GlobalModel, Round
from qflare_server.storage.repository import (
    audit_tree,
    evaluations,
    evidence,
    global_models,
    neighbors,
    training_sessions,
    unmaskings,
)
from qflare_server.storage.repository.evidence import UpdateOfVersion
from qflare_server.storage.tables import GroupStage, UpdateOrigin
from qflare_server.training.neighbor_opening import open_group, read_contents
from qflare_server.training.versions import find_version
from qflare_server.use_cases.audit.log import EntryProof
from qflare_server.use_cases.audit.sequencer import AuditSequencer, SignedHead, entry_of

BATCH: Final = 100
"""Versions, updates or evaluations read per query."""
PART_BYTES: Final = 2**20
"""Maximum bytes of a part, unless a single piece of evidence is larger; each is below 300 KiB."""
Bundle = verification_pb2.VerificationBundle


class Evidence:
    """Exports verification bundles for auditors."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sequencer = AuditSequencer(context)

    def bundle(self, training_session_id: str, version: int | None = None) -> Iterator[Bundle]:
        """Yield the parts of a version's bundle.

        Args:
            training_session_id: Training session.
            version: None means the latest.

        Raises:
            TrainingSessionNotFoundError: There is no such training session.
            GlobalModelNotFoundError: There is no such version.
        """
        model = self._model(training_session_id, version)
        head = self._sequencer.head(fresh=True)
        return _packed(self._pieces(model, head))

    def _pieces(self, model: GlobalModel, head: SignedHead) -> Iterator[Bundle]:
        """Yield the bundle in small pieces, in the order of its fields."""
        yield from self._first(model, head)
        yield from self._lineage(model)
        shown: set[str] = set()
        tasks: set[int] = set()
        yield from self._updates(model, head, shown, tasks)
        yield from self._unmasking(model, tasks)
        yield from self._evaluations(model, head, shown)

    def _model(self, training_session_id: str, version: int | None) -> GlobalModel:
        with self._context.database.read() as session:
            return find_version(session, training_session_id, version)[1]

    def _first(self, model: GlobalModel, head: SignedHead) -> Iterator[Bundle]:
        yield Bundle(
            realm=self._context.config.realm,
            training_session_id=model.training_session_id,
            version=model.version,
            create_time=timestamp_of(self._context.clock()),
            head=head.envelope,
        )
        with self._context.database.read() as session:
            roots = [_envelope(data) for data in evidence.trust_documents(session, "root")]
            keysets = [_envelope(data) for data in evidence.trust_documents(session, "keyset")]
            entries = _entry(session, head, VERSION_SIGNED, f"version:{model.digest}")
        yield Bundle(entries=entries)
        for root in roots:
            yield Bundle(keyset=security_pb2.KeysetBundle(roots=[root]))
        if keysets:
            yield Bundle(keyset=security_pb2.KeysetBundle(keyset=keysets[-1]))
        for keyset in keysets[:-1]:
            yield Bundle(earlier_keysets=[keyset])

    def _lineage(self, model: GlobalModel) -> Iterator[Bundle]:
        first = 0
        while first <= model.version:
            with self._context.database.read() as session:
                rows = global_models.statements(
                    session, model.training_session_id, first, model.version, BATCH
                )
            for payload, signed in rows:
                yield Bundle(statements=[_stored(payload, signed)])
            first += len(rows)

    def _updates(
        self, model: GlobalModel, head: SignedHead, shown: set[str], tasks: set[int]
    ) -> Iterator[Bundle]:
        """Yield the updates of a version.

        Adds the devices whose keys are included to `shown`, and the rounds for whose tasks masked updates were made to
        `tasks`.
        """
        after = 0
        while True:
            with self._context.database.read() as session:
                rows = evidence.updates_of_version(
                    session, model.training_session_id, model.version, after, BATCH
                )
                if not rows:
                    return
                devices = {row.device_id for row in rows if row.statement is not None} - shown
                keys = evidence.keys_of(session, devices)
                subjects = [f"update:{row.id}" for row in rows]
                entries = [_entry(session, head, UPDATE_ACCEPTED, item) for item in subjects]
            yield from (Bundle(updates=[_update(row)]) for row in rows)
            tasks |= {number for row in rows if (number := _masked_for(row)) is not None}
            yield from (Bundle(device_keys=[key_evidence(key)]) for key in keys)
            yield from (Bundle(entries=found) for found in entries)
            shown |= devices
            after = rows[-1].acceptance_sequence

    def _unmasking(self, model: GlobalModel, tasks: Collection[int]) -> Iterator[Bundle]:
        """Yield the transcript of secure aggregation, if the version has one; `tasks` are the rounds of its updates."""
        with self._context.database.read() as session:
            current = training_sessions.get_round(
                session, model.training_session_id, model.round_number
            )
            rows = unmaskings.of_round(session, model.training_session_id, model.round_number)
        if not rows:
            yield from self._neighbors(model, current)
            return
        transcript = verification_pb2.UnmaskingTranscript(
            answers=[_envelope(row.answer) for row in rows]
        )
        if current is not None and current.task is not None:
            transcript.task.CopyFrom(_envelope(current.task))
        yield Bundle(unmasking=transcript)
        for number in sorted(set(tasks) - {model.round_number}):
            with self._context.database.read() as session:
                earlier = training_sessions.get_round(session, model.training_session_id, number)
            if earlier is not None and earlier.task is not None:
                task = _envelope(earlier.task)
                yield Bundle(unmasking=verification_pb2.UnmaskingTranscript(earlier_tasks=[task]))

    def _neighbors(self, model: GlobalModel, current: Round | None) -> Iterator[Bundle]:
        """Yield the transcripts of the groups of a round with neighbors, and the keys of those that dropped out."""
        if current is None or current.task is None:
            return
        key = model.training_session_id, model.round_number
        with self._context.database.read() as session:
            training_session = training_sessions.get_session(session, key[0])
            groups = [
                group.number
                for group in neighbors.groups_of(session, *key)
                if group.stage == GroupStage.OPENED.value
            ]
            if training_session is None or not groups:
                return
            contents = [
                read_contents(session, *key, training_session.config, number) for number in groups
            ]
            dropped = {
                member.device_id
                for group in contents
                for member in group.members
                if not member.update_digest
            }
            rows = evidence.keys_of(session, dropped)
        yield from (Bundle(device_keys=[key_evidence(row)]) for row in rows)
        task = verification_pb2.UnmaskingTranscript(task=_envelope(current.task))
        yield Bundle(unmasking=task)
        for place, item in enumerate(contents):
            for part in transcript_parts(place, open_group(item).serialized()):
                yield Bundle(unmasking=verification_pb2.UnmaskingTranscript(groups=[part]))

    def _evaluations(
        self, model: GlobalModel, head: SignedHead, shown: set[str]
    ) -> Iterator[Bundle]:
        after = ""
        while True:
            with self._context.database.read() as session:
                rows = evaluations.signed_rows(
                    session, model.training_session_id, model.version, after, BATCH
                )
                if not rows:
                    return
                devices = {row.device_id for row in rows} - shown
                keys = evidence.keys_of(session, devices)
                subjects = [f"evaluation:{row.statement_digest}" for row in rows]
                entries = [_entry(session, head, EVALUATION_REPORTED, item) for item in subjects]
            yield from (Bundle(evaluations=[_signed(row.statement, row.signature)]) for row in rows)
            yield from (Bundle(device_keys=[key_evidence(key)]) for key in keys)
            yield from (Bundle(entries=found) for found in entries)
            shown |= devices
            after = rows[-1].device_id


def _packed(pieces: Iterable[Bundle]) -> Iterator[Bundle]:
    """Merge pieces of a bundle into parts of the maximum size."""
    part, size_bytes = Bundle(), 0
    for piece in pieces:
        added = piece.ByteSize()
        if size_bytes and size_bytes + added > PART_BYTES:
            yield part
            part, size_bytes = Bundle(), 0
        part.MergeFrom(piece)
        size_bytes += added
    yield part


def audit_evidence(proof: EntryProof) -> verification_pb2.AuditEvidence:
    """Return an entry and its proof as a message."""
    return _evidence(proof.entry, proof.leaf_index, proof.tree_size, proof.siblings)


def _evidence(
    entry: Entry, leaf_index: int, tree_size: int, siblings: Any
) -> verification_pb2.AuditEvidence:
    return verification_pb2.AuditEvidence(
        audit_id=entry.audit_id,
        event_type=entry.event_type,
        actor=entry.actor,
        subject=entry.subject,
        peer_address=entry.peer_address,
        authentication_method=entry.authentication_method,
        risk_level=entry.risk_level,
        details=entry.details,
        create_time=timestamp_of(entry.created_at),
        salt=entry.salt.hex(),
        proof=security_pb2.InclusionProof(
            leaf_index=leaf_index,
            tree_size=tree_size,
            sibling_digests=[sibling.hex() for sibling in siblings],
        ),
    )


def _entry(
    session: Session, head: SignedHead, event_type: str, subject: str
) -> list[verification_pb2.AuditEvidence]:
    """Return the entry of an event with its proof; empty if the head covers none."""
    row = evidence.find_event(session, event_type, subject)
    if row is None or row.leaf_index is None or row.leaf_index >= head.size:
        return []
    place = row.leaf_index
    siblings = audit_tree.prove(
        session, lambda node: merkle.inclusion_proof(node, place, head.size)
    )
    return [_evidence(entry_of(row), place, head.size, siblings)]


def _update(row: UpdateOfVersion) -> verification_pb2.UpdateEvidence:
    message = verification_pb2.UpdateEvidence(
        statement_digest=row.statement_digest,
        pruned=row.location == "none",
        in_process=row.origin == UpdateOrigin.IN_PROCESS.value,
    )
    if row.statement is not None and row.signature is not None:
        message.statement.CopyFrom(_signed(row.statement, row.signature))
    return message


def _masked_for(row: UpdateOfVersion) -> int | None:
    """Return the round for whose task an update was masked; None if it is not masked."""
    statement = security_pb2.UpdateStatement.FromString(row.statement or b"")
    return statement.round_number if statement.HasField("masking") else None


def _signed(statement: bytes | None, signature: bytes | None) -> security_pb2.SignedEnvelope:
    """Return the envelope of a statement and its signature, which are stored in two columns."""
    assert statement is not None
    assert signature is not None
    signatures = [security_pb2.Signature.FromString(signature)]
    return security_pb2.SignedEnvelope(payload=statement, signatures=signatures)


def _envelope(data: bytes) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope.FromString(data)


def _stored(payload: bytes, envelope: bytes) -> security_pb2.SignedEnvelope:
    message = _envelope(envelope)
    message.payload = payload
    return message
