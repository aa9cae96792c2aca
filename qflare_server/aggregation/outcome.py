"""Per-update outcome of a round, stored with the version."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from qflare_server.context import Context
from qflare_server.payloads.reader import Contents
from qflare_server.storage.payload_records import describe
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import payloads
from qflare_server.strategies import Outcome, UpdateAssessment, outcome_from_data


def read_outcome(context: Context, model: GlobalModel) -> Outcome | None:
    """Return the per-update outcome of a version's round; None where none was kept.

    It is not signed; recomputing the version from it verifies it.

    Raises:
        ValueError: The record is malformed.
        PayloadPrunedError: It is no longer kept.
    """
    payload_id = model.strategy_state.get("outcome")
    if payload_id is None or model.rollback_version is not None:
        return None
    with context.database.read() as session:
        stored = describe(payloads.get_payload(session, payload_id))
    contents = Contents(context, stored)
    return outcome_from_data(json.loads(b"".join(contents.read(0, contents.piece_count))))


def with_refusals(
    outcome: Outcome, update_ids: Sequence[str], refusals: Mapping[str, str]
) -> Outcome:
    """Return the outcome of a round, including updates that were not folded, in the order of acceptance."""
    if not refusals:
        return outcome
    judged = {entry.update_id: entry for entry in outcome.judgements}
    for update_id, reason in refusals.items():
        judged[update_id] = UpdateAssessment(update_id, 0.0, 0.0, 0.0, rejection=reason)
    ordered = tuple(judged[update_id] for update_id in update_ids if update_id in judged)
    return dataclasses.replace(outcome, judgements=ordered)
