"""Detection of repeated calls by their request id."""

from qflare_server.context import Context
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.idempotent_calls import raise_if_repeated


class RepeatedCalls:
    """Detects repeated calls before they are executed.

    A repeated call is not checked against the state that the first one has changed. Concurrent calls are serialized by
    the transaction of the change.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def require_new(self, caller: Caller) -> None:
        """Refuse a call whose request id was used before.

        Raises:
            RepeatedCallError: The call was made before; the error carries its response.
            RequestIdReusedError: A call with another body had the request id.
            AlreadyExistsError: The call was made before and issued secrets, which are not kept.
        """
        with self._context.database.read() as session:
            raise_if_repeated(session, caller)
