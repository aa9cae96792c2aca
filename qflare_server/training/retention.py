"""Prunes update payloads and sweeps orphaned chunks.

Payloads are pruned in two steps: a transaction marks them pruned and records their chunks as an abandoned upload;
sweeping then deletes the chunks, and can be repeated after a crash. An expired upload is abandoned in a transaction of
its own before its chunks are deleted. A device that resumes it concurrently either finishes first or is told to start
again.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Final

from sqlalchemy.orm import Session

from qflare.v1 import training_pb2
from qflare_server.context import Context
from qflare_server.storage.place_ownership import require_owner
from qflare_server.storage.repository import payloads, training_sessions
from qflare_server.training.neighbor_retention import trim_groups

PRUNE_BATCH: Final = 250


def prune_payloads(context: Context, training_session_id: str) -> None:
    """Mark payloads beyond a training session's retention as pruned, in batches.

    Rounds count that made a version: the last `retained_rounds` of them are kept, or none. Only payloads of updates
    whose round is over are pruned, never those of versions. A round that was pruned is not looked at again. What
    members of groups have sent for their masks is deleted after every round, whatever is retained.
    """
    trim_groups(context, training_session_id)
    with context.database.read() as session:
        training_session = training_sessions.get_session(session, training_session_id)
        if training_session is None:
            return
        policy = training_session.config.transfer
        if policy.payload_retention == training_pb2.PAYLOAD_RETENTION_ALL:
            return
        kept: list[int] = []
        if policy.payload_retention != training_pb2.PAYLOAD_RETENTION_NONE:
            kept = training_sessions.last_published_rounds(
                session, training_session_id, policy.retained_rounds
            )
        due = training_sessions.unpruned_rounds(session, training_session_id, kept)
    for number, accepted_count in due:
        for last in [*range(PRUNE_BATCH, accepted_count, PRUNE_BATCH), accepted_count]:
            context.database.write(partial(_prune, context, training_session_id, number, last))


def _prune(
    context: Context, training_session_id: str, number: int, last: int, session: Session
) -> None:
    """Prune a batch of a round's updates, up to acceptance sequence `last`; note where it is the round's last batch."""
    current = training_sessions.lock_round(session, training_session_id, number)
    if current is None or current.pruned_at is not None:
        return
    at = context.clock()
    payloads.prune_updates(session, training_session_id, number, last, PRUNE_BATCH, at)
    if last == current.accepted_count:
        training_sessions.update_round(session, training_session_id, number, {"pruned_at": at})


def prune_ended(context: Context) -> None:
    """Prune recently ended training sessions, in case of a crash between their end and their pruning."""
    since = context.clock() - timedelta(days=1)
    with context.database.read() as session:
        ended = training_sessions.ended_since(session, since)
    for training_session_id in ended:
        prune_payloads(context, training_session_id)


def sweep(context: Context) -> int:
    """Delete the chunks of all expired uploads; return the number of uploads.

    Chunks in a payload store that is not configured stay until it is.
    """
    before = context.clock() - timedelta(seconds=context.config.upload_expiry_s)
    count = 0
    while True:
        with context.database.read() as session:
            expired = payloads.expired_uploads(session, before, context.store_names, PRUNE_BATCH)
        discard_uploads(context, expired)
        count += len(expired)
        if len(expired) < PRUNE_BATCH:
            return count


def discard_uploads(context: Context, uploads: Sequence[payloads.ChunkSet]) -> None:
    """Abandon uploads and delete their chunks at once; after a crash in between, the next sweep deletes them.

    Raises:
        PayloadPlaceTakenError: Another database owns their folder or bucket; nothing is deleted.
    """
    if not uploads:
        return
    for name in {chunks.store for chunks in uploads} & context.store_names:
        require_owner(context.database, context.store_of(name))
    context.database.write(lambda session: payloads.give_up_uploads(session, uploads))
    for chunks in uploads:
        if chunks.store in context.store_names:
            context.store_of(chunks.store).delete([chunks.payload_id])
            context.database.write(partial(payloads.end_upload, chunks=chunks))


def sweep_orphans(context: Context) -> int:
    """Delete chunks that no row refers to, as after a restore of an earlier database; return the number of payloads.

    Lists every payload store, so it runs rarely.
    """
    count = 0
    for store in context.stores:
        ids = iter(store.payload_ids())
        while batch := list(islice(ids, PRUNE_BATCH)):
            # Afterwards: what another database writes once it is the owner is not among them.
            require_owner(context.database, store)
            count += context.database.write(
                partial(payloads.claim_orphans, store=store.name, payload_ids=batch)
            )
    if count:
        sweep(context)
    return count
