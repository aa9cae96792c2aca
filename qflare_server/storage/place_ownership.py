"""Exclusive ownership of the folder or bucket of a payload store, so that a copied database cannot delete from it.

A database that was restored from a backup, or copied, refers to the payloads of the original. If both were in use, each
would delete what the other has received since. Therefore database and place repeat one random name, the owner, which
the coordinators replace every minute. A copy of the database is left with an earlier name: it can read, but it neither
serves nor deletes until an operator makes it the owner (`qflare-server payloads claim`). The original then stops.

The new name is recorded in the database before it is written to the place, and coordinators of one database write the
same one, so that a crash or a freeze between any two steps leaves a name that the database knows.
"""

import secrets
import time
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.errors import PayloadPlaceTakenError
from qflare_server.storage.database import Database
from qflare_server.storage.payload_store import DATABASE, PayloadStore
from qflare_server.storage.repository import payloads

LOOK_S: Final = 10.0
"""Seconds between two looks of a coordinator at the owner."""
RENEW_S: Final = 60.0
"""Seconds between two changes of the owner's name."""
FIRST_S: Final = 2 * RENEW_S
"""Seconds after its start at which a coordinator changes the name first; until then, that of a running original shows
in a coordinator on a copy."""
ATTEMPTS: Final = 3


def require_owner(database: Database, store: PayloadStore) -> str:
    """Check that a database owns the folder or bucket of a payload store, or nobody does.

    Returns:
        The owner's name; empty if there is none, as always for the payload store `database`.

    Raises:
        PayloadPlaceTakenError: Another database owns it.
        StoreUnavailableError: The store cannot be reached.
    """
    if store.name == DATABASE:
        return ""
    # Another coordinator of this database may change the name between the two reads.
    for _attempt in range(ATTEMPTS):
        found = store.owner()
        if not found or found in _known(database, store):
            return found
    raise PayloadPlaceTakenError(store.name)


def renew(database: Database, store: PayloadStore) -> None:
    """Change the owner's name.

    Raises:
        PayloadPlaceTakenError: Another database owns the folder or bucket.
        StoreUnavailableError: The store cannot be reached.
    """
    before = require_owner(database, store)
    _replace(database, store, before, forced=False)


def claim(database: Database, store: PayloadStore) -> None:
    """Make a database the owner of the folder or bucket of a payload store, whoever was it before.

    Raises:
        PayloadPlaceTakenError: Another database became it at the same time.
        StoreUnavailableError: The store cannot be reached.
    """
    _replace(database, store, store.owner(), forced=True)


def _known(database: Database, store: PayloadStore) -> set[str]:
    with database.read() as session:
        return payloads.place_owners(session, store.name)


def _replace(database: Database, store: PayloadStore, before: str, *, forced: bool) -> None:
    name = secrets.token_hex(16)

    def begin(session: Session) -> str:
        return payloads.begin_owner(session, store.name, name, forced=forced)

    agreed = database.write(begin)
    store.replace_owner(before, agreed)
    if require_owner(database, store) == agreed:
        database.write(lambda session: payloads.finish_owner(session, store.name, agreed))


class PlaceKeeper:
    """Keeps the folder or bucket of one payload store for the database of a running coordinator; for one thread.

    Args:
        database: The database.
        store: The payload store.
    """

    def __init__(self, database: Database, store: PayloadStore) -> None:
        self._database = database
        self._store = store
        self._owner = ""
        self._look_at = time.monotonic()
        self._renew_at = self._look_at + FIRST_S

    def keep(self) -> None:
        """Look at the owner if that is due, and change its name unless another coordinator has done so recently.

        Raises:
            PayloadPlaceTakenError: Another database owns the folder or bucket.
            StoreUnavailableError: The store cannot be reached.
        """
        now = time.monotonic()
        if now < self._look_at:
            return
        found = require_owner(self._database, self._store)
        if found != self._owner:
            self._owner = found
            self._renew_at = max(self._renew_at, now + RENEW_S)
        elif now >= self._renew_at and self._store.name != DATABASE:
            renew(self._database, self._store)
            self._renew_at = now + RENEW_S
        self._look_at = now + LOOK_S
