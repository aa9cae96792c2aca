"""Statements on names of devices: unique in one database, for people; a device's id is its identity."""

import unicodedata
from collections.abc import Iterable
from typing import Final

from sqlalchemy import bindparam, exists, select
from sqlalchemy.orm import Session

from qflare.references import SHORT_ID, is_whole_id
from qflare_server.storage import tables
from qflare_server.storage.prepared import OneOf, PreparedStatement

DEVICES = tables.Device.__table__
MAX_NAME: Final = 64
MAX_BASE: Final = MAX_NAME - len("-9999999")
NAME_BYTES: Final = 4 * MAX_NAME + 4
"""Most bytes of a name in a message."""
_TAKEN = select(exists().where(DEVICES.c.name == bindparam("name")))
_NAMES = PreparedStatement(select(DEVICES.c.id, DEVICES.c.name).where(OneOf(DEVICES.c.id, "ids")))


def is_name(text: str) -> bool:
    """Return whether a device can have this name: one printable word that is neither an option nor a UUID."""
    is_word = text.isprintable() and not any(character.isspace() for character in text)
    is_short = 1 <= len(text) <= MAX_NAME
    return is_word and is_short and text[0] != "-" and not is_whole_id(text.lower())


def wanted_name(label: str, device_id: str) -> str:
    """Return the name to give a device: its label as one word, else its id; a UUID is shortened to 8 characters."""
    return _word(label) or _word(device_id) or device_id[:SHORT_ID]


def _word(text: str) -> str:
    """Return a text as a name, empty if nothing of it can be kept."""
    normal = unicodedata.normalize("NFC", text)
    printable = "".join(letter if letter.isprintable() else " " for letter in normal)
    word = "-".join(printable.split()).strip("-")[:MAX_BASE]
    return word if is_name(word) else ""


def free_name(session: Session, wanted: str) -> str:
    """Return a name that no device has: the wanted one, else with -2, -3 and so on; 2 log n lookups for n devices."""
    if not is_taken(session, wanted):
        return wanted
    taken, free = 1, 2
    while is_taken(session, f"{wanted}-{free}"):
        taken, free = free, 2 * free
    while free - taken > 1:
        middle = (taken + free) // 2
        if is_taken(session, f"{wanted}-{middle}"):
            taken = middle
        else:
            free = middle
    return f"{wanted}-{free}"


def is_taken(session: Session, name: str) -> bool:
    """Return whether a device has this name."""
    return bool(session.connection().execute(_TAKEN, {"name": name}).scalar_one())


def names_of(session: Session, device_ids: Iterable[str]) -> dict[str, str]:
    """Return names by id; unknown ids are left out."""
    wanted = sorted(set(device_ids))
    return dict(_NAMES.rows(session, {"ids": wanted})) if wanted else {}
