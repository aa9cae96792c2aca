"""Handing out the whole audit log, oldest entry first, in batches of one read each."""

from collections.abc import Iterator, Sequence
from typing import Final

from qflare_server.context import Context
from qflare_server.errors import InvalidRequestError
from qflare_server.storage.repository import views
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.tables import AuditLog

BATCH: Final = 500


class AuditExport:
    """Use case of an auditor who wants every entry."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def batches(self, wanted: AuditFilter, after_id: int) -> Iterator[Sequence[AuditLog]]:
        """Yield batches of entries; no transaction is open between two.

        Args:
            wanted: Which entries.
            after_id: Only entries after this one; 0 means all.

        Raises:
            InvalidRequestError: The entry's number is negative.
        """
        if after_id < 0:
            raise InvalidRequestError(f"after_audit_id: got {after_id}", field="after_audit_id")
        batch: Sequence[AuditLog] = ()
        while True:
            with self._context.database.read() as session:
                batch = views.audit_after(session, after_id, wanted, BATCH)
                session.expunge_all()
            if batch:
                yield batch
                after_id = batch[-1].id
            if len(batch) < BATCH:
                return
