"""Deletes what the members of groups have sent, once their round is over.

Of a version, the transcripts of its groups are kept, from which it can be verified and recomputed. Shares, boxes and
revealed shares go: with them and the keys of a device that is broken into later, single updates could be read. Deleting
can be repeated after a crash.
"""

import logging
from functools import partial

from sqlalchemy.orm import Session

from qflare.evidence.statements import StatementError
from qflare.masking.neighbors import NeighborError, NotEnoughSharesError
from qflare_server.context import Context
from qflare_server.storage.repository import neighbors, training_sessions
from qflare_server.storage.tables import GroupStage
from qflare_server.training.neighbor_opening import open_group, read_contents
from qflare_server.training.neighbor_stages import has_neighbors

logger = logging.getLogger(__name__)


def trim_groups(context: Context, training_session_id: str) -> None:
    """Delete what members have sent in rounds of a training session that are over, but for transcripts of versions."""
    with context.database.read() as session:
        training_session = training_sessions.get_session(session, training_session_id)
        if training_session is None or not has_neighbors(training_session.config):
            return
        ended = neighbors.untrimmed_rounds(session, training_session_id)
    for number, is_published in ended:
        try:
            pieces = _pieces(context, training_session_id, number) if is_published else {}
        except (StatementError, NeighborError, NotEnoughSharesError):
            logger.exception("groups not trimmed: session=%s round=%d", training_session_id, number)
            continue
        context.database.write(partial(_trim, training_session_id, number, pieces))


def _pieces(context: Context, training_session_id: str, number: int) -> dict[str, bytes]:
    """Return the part of each member, by device, in the transcripts of the groups in a version."""
    key = training_session_id, number
    with context.database.read() as session:
        training_session = training_sessions.get_session(session, training_session_id)
        assert training_session is not None
        groups = [
            read_contents(session, *key, training_session.config, group.number)
            for group in neighbors.groups_of(session, *key)
            if group.stage == GroupStage.OPENED.value
        ]
    made = {}
    for contents in groups:
        pieces = open_group(contents).pieces()
        made.update({item.device_id: pieces[item.digest] for item in contents.members})
    return made


def _trim(
    training_session_id: str, number: int, pieces: dict[str, bytes], session: Session
) -> None:
    if training_sessions.lock_round(session, training_session_id, number) is not None:
        neighbors.trim_members(session, training_session_id, number, pieces)
