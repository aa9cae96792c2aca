"""Polls of devices without a task, answered from memory in gRPC's thread.

Most calls of a large fleet are such polls, and handing one to another thread costs more than answering it. This path
never waits: it sends no query, and takes locks only for the time of a dictionary access. It admits a call by the same
rules as `interceptor.CallInterceptor`, by what earlier calls have left in memory. If that is out of date or does not
suffice, or the call is to be refused, the call takes the general path, which decides.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from qflare.v1 import coordinator_service_pb2 as pb
from qflare_server.context import Context
from qflare_server.errors import QflareError, release_frames
from qflare_server.serving.rpc.coordinator_service import task_response
from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.serving.rpc.interceptor import CallInterceptor
from qflare_server.serving.rpc.validation import validating
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.access.authentication import POLLS, Principal, sole_value
from qflare_server.use_cases.access.login import AUTHORIZATION, bearer_of
from qflare_server.use_cases.training_sessions.tasks import NextTask

logger = logging.getLogger(__name__)

KIND: Final = "unary"

_parse = validating(pb.GetTaskRequest.FromString)


class IdlePolls:
    """Answers polls from memory; thread-safe.

    Args:
        context: Dependencies of the use cases.
        use_cases: The use cases.
        boundary: The general path.
    """

    def __init__(self, context: Context, use_cases: UseCases, boundary: CallInterceptor) -> None:
        self._context = context
        self._use_cases = use_cases
        self._boundary = boundary
        self._last_sent: tuple[NextTask, bytes] | None = None

    def answer(self, call: IncomingCall) -> bool:
        """Answer a poll of a device without a task; return False for any other call, which is left as it is."""
        if call.route.method not in POLLS or self._boundary.must_see_all:
            return False
        began_at = time.monotonic()
        try:
            task = self._find(call)
        except QflareError as error:
            release_frames(error)
            return False
        except Exception:
            logger.exception("a poll was not answered from memory; it takes the general path")
            return False
        if task is None:
            return False
        call.reply(self._encoded(task))
        self._report(call.route.method, time.monotonic() - began_at)
        return True

    def _find(self, call: IncomingCall) -> NextTask | None:
        """Return that the caller has no task; None if memory does not say so for certain.

        Raises:
            QflareError: The call is to be refused.
        """
        epochs = self._context.database.epochs_snapshot()
        data = call.messages.first_held
        if epochs is None or data is None:
            return None
        request = _parse(data)
        bearer = bearer_of(sole_value(call.metadata, AUTHORIZATION))
        access = self._use_cases.authentication
        caller: Principal | None = access.admit_remembered(call.route.method, bearer, epochs)
        if caller is None or caller.device_id is None:
            return None
        asked = request.training_session_id
        if asked and not self._use_cases.objects.remembers(caller.device_id, asked, epochs):
            return None
        task = self._use_cases.tasks.remembered(
            caller.device_id, asked, request.trains_only, request.answers_queries, epochs
        )
        if task is not None:
            self._boundary.rates.take(caller.name)
        return task

    def _encoded(self, task: NextTask) -> bytes:
        """Return the response, which is the same for most devices."""
        last = self._last_sent
        if last is not None and last[0] == task:
            return last[1]
        encoded = task_response(task).SerializeToString()
        self._last_sent = task, encoded
        return encoded

    def _report(self, method: str, seconds: float) -> None:
        telemetry = self._context.telemetry
        telemetry.call_started(method, KIND)
        telemetry.message_received(method, KIND)
        telemetry.message_sent(method, KIND)
        telemetry.call_handled(method, KIND, "OK", seconds, "")
