"""References to devices and training sessions, as people type them: an id, the beginning of one, or a name.

A coordinator lists what a reference may mean: the object with that id, else those with that name or whose id begins
with the reference (4 characters or more). `choose` picks the only one.
"""

import uuid
from collections.abc import Sequence
from typing import Final, NamedTuple

LEAST_PREFIX: Final = 4
"""Fewest characters of an id that refer to it."""
MAX_CANDIDATES: Final = 10
"""Candidates that an error lists; ask a coordinator for one more."""
SHORT_ID: Final = 8


class Named(NamedTuple):
    """An object with the id and the name that a person may refer to it by."""

    id: str
    name: str


class ManyMeantError(ValueError):
    """A reference means several objects; the message lists them."""


def is_whole_id(reference: str) -> bool:
    """Return whether a reference is a whole id for certain: a UUID."""
    try:
        return str(uuid.UUID(reference)) == reference
    except ValueError:
        return False


def short_id(object_id: str) -> str:
    """Return an id in the short form that is shown beside a name: 8 characters of a UUID, other ids whole."""
    return object_id[:SHORT_ID] if is_whole_id(object_id) else object_id


def party(text: str, name: str) -> str:
    """Return an actor or subject of an audit entry for people, as `device:ward-2 (5f0c31aa)` if it has a name."""
    kind, _, object_id = text.partition(":")
    return f"{kind}:{name} ({short_id(object_id)})" if name else text


def choose(reference: str, candidates: Sequence[Named]) -> str | None:
    """Return the id that a reference means, None if there are no candidates.

    Args:
        reference: What a person typed.
        candidates: What it may mean: at least `MAX_CANDIDATES` + 1 of them if there are so many.

    Raises:
        ManyMeantError: There are several candidates.
    """
    for candidate in candidates:
        if candidate.id == reference:
            return reference
    if len(candidates) > 1:
        listed = [f"{item.name} ({item.id})" for item in candidates[:MAX_CANDIDATES]]
        more = ", ..." if len(candidates) > MAX_CANDIDATES else ""
        raise ManyMeantError(f"{reference!r} may be {', '.join(listed)}{more}")
    return candidates[0].id if candidates else None
