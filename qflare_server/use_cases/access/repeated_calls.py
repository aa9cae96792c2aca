"""Calls with a request id that were made before."""

from qflare_server.context import Context
from qflare_server.storage.repository.audit import Caller
from qflare_server.storage.repository.idempotent_calls import raise_if_repeated


class RepeatedCalls:
    """Recognizes repeated calls before they are made again.

    That spares a repeated call the checks of a state that has moved on since the first one. Calls made at the same
    time are told apart by the transaction of the change.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def require_new(self, caller: Caller) -> None:
        """Do nothing for a call that was not made before.

        Raises:
            RepeatedCallError: The call was made before; has its response.
            RequestIdReusedError: A call with another body had the request id.
            AlreadyExistsError: The call was made before and issued secrets, which are not kept.
        """
        with self._context.database.read() as session:
            raise_if_repeated(session, caller)
