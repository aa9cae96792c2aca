"""Call dispatch: receives messages without a thread, and assigns calls to a thread pool per class of callers.

gRPC uses the `Dispatcher` as its thread pool. An incoming call is classified by its method and by the last known owner
of its token. It gets a thread when there is work: its message has arrived, a small update has arrived completely, or a
large one has begun to transfer. A poll that memory answers (`idle_polls`) needs no thread at all, and a thread takes
all small updates that have arrived together (`small_updates`). A caller that sends nothing, or a byte per second,
therefore occupies no thread, and unauthenticated callers, devices, administrators and probes never wait for each
other's threads.

Short calls of devices have precedence over their uploads. An upload pauses between two chunks while such calls wait or
are handled: each of its chunks keeps a processor for milliseconds and takes the interpreter's lock many times, for
which a short call would wait at each of its own steps. A pause is bounded, so an upload goes on beside any number of
short calls.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import unquote

from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.context import Telemetry
from qflare_server.serving.rpc.call import RunningCalls
from qflare_server.serving.rpc.half_open import HalfOpenCalls
from qflare_server.serving.rpc.incoming import IncomingCall, Refusal, check_grpcio
from qflare_server.serving.rpc.limits import StreamLimits
from qflare_server.serving.rpc.route import Audience
from qflare_server.serving.rpc.streams import READ_AHEAD
from qflare_server.serving.rpc.thread_pools import BatchPool, FairPool
from qflare_server.serving.rpc.transfers import TransferPool
from qflare_server.use_cases.access.authentication import KnownCaller
from qflare_server.use_cases.access.rate_limits import network_of

logger = logging.getLogger(__name__)

TICK_S: Final = 0.25
REVIEW_TICKS: Final = 4
HEALTH_THREADS: Final = 2
REFLECTION_THREADS: Final = 4
"""A stream whose caller neither sends nor reads keeps one of them only while no other waits."""
UPDATE_THREADS: Final = 3
"""One verifies signatures while another waits for its transaction; more would take fewer updates at once each."""
UPDATES_AT_ONCE: Final = 32
"""Small updates that a thread takes at once: the last waits for the signatures of all, some milliseconds."""
LONGEST_PAUSE_S: Final = 0.03
"""How long an upload lets short calls pass before it takes a chunk: it gets 30 MB/s beside any load of them."""
ADMIN_STREAM_THREADS: Final = 4
MAX_STRANGER_BYTES: Final = 64 * 1024
"""Largest message of an unauthenticated caller: a few kilobytes of keys and signatures."""

STALLED: Final = Refusal.from_error(errors.StalledError("the message did not come in time"))
CROWDED: Final = Refusal.from_error(errors.TooManyRequestsError("too many calls wait"))
TOO_LARGE: Final = Refusal.from_error(
    errors.InvalidRequestError(f"without a credential: want at most {MAX_STRANGER_BYTES} bytes")
)


class Gatekeeper(Protocol):
    """Identifies callers by the metadata of a call."""

    def recognize(self, metadata: Any) -> KnownCaller | None:
        """Return the last known owner of the token, from memory."""

    def introduce(self, metadata: Any) -> KnownCaller | None:
        """Look up the token and return its owner."""


class BatchHandler(Protocol):
    """Answers calls of devices together."""

    def takes(self, call: IncomingCall) -> bool:
        """Return whether a call, which has arrived, is one of those."""

    def answer(self, calls: Sequence[IncomingCall]) -> Sequence[IncomingCall]:
        """Answer calls and return those that need a thread of their own, as they were."""


class Dispatcher:
    """Receives calls and assigns them to the threads of their class.

    Args:
        config: Thread counts, limits and timeouts.
        gatekeeper: Identifies devices and administrators.
        limits: Limits the streams per caller.
        telemetry: Sink for the calls that are refused without a thread.
        answer: Answers a call from memory, without waiting, and returns whether it has; else the call gets a thread.
        together: Answers calls of devices together; None means that each call gets a thread.

    Raises:
        RuntimeError: The version of grpcio is not supported.
    """

    def __init__(
        self,
        config: ServerConfig,
        gatekeeper: Gatekeeper,
        limits: StreamLimits,
        telemetry: Telemetry,
        answer: Callable[[IncomingCall], bool] = lambda _call: False,
        together: BatchHandler | None = None,
    ) -> None:
        check_grpcio()
        self._answer = answer
        self._together = together
        self._config = config
        self._gatekeeper = gatekeeper
        self._limits = limits
        self._telemetry = telemetry
        self._small_stream_bytes = config.inline_payload_bytes + MAX_STRANGER_BYTES
        self._first_message_s = min(config.first_message_timeout_s, config.stall_timeout_s)
        self._refused: Counter[str] = Counter()
        self._strangers = HalfOpenCalls(config.max_waiting_calls)
        self._known = HalfOpenCalls(config.max_waiting_calls)
        self._short = RunningCalls()
        self._health = self._pool("health", HEALTH_THREADS)
        self._reflection = self._transfers("reflection", REFLECTION_THREADS)
        self._anonymous = self._pool("anonymous", config.anonymous_threads)
        self._devices = self._pool("device", config.rpc_threads)
        self._updates = self._batches("update", UPDATE_THREADS)
        self._administrators = self._pool("admin", config.admin_threads)
        self._admin_streams = self._pool("admin-stream", ADMIN_STREAM_THREADS + config.max_watchers)
        self._uploads = self._transfers("upload", config.max_uploads)
        self._downloads = self._transfers("download", config.max_downloads)
        self._stopped = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="calls", daemon=True)
        self._supervisor.start()

    def _pool(self, name: str, thread_count: int) -> FairPool:
        return FairPool(
            name,
            thread_count,
            max_waiting=self._config.max_waiting_calls,
            max_waiting_per_caller=self._config.max_waiting_calls_per_caller,
            displaced=partial(self._refuse, refusal=CROWDED),
        )

    def _batches(self, name: str, thread_count: int) -> BatchPool:
        return BatchPool(
            name,
            thread_count,
            UPDATES_AT_ONCE,
            self._answer_together,
            max_waiting=self._config.max_waiting_calls,
            max_waiting_per_caller=self._config.max_waiting_calls_per_caller,
            displaced=partial(self._refuse, refusal=CROWDED),
        )

    def _answer_together(self, calls: Sequence[IncomingCall]) -> None:
        assert self._together is not None
        for call in self._together.answer(calls):
            self._enqueue(self._devices, call)

    def _transfers(self, name: str, place_count: int) -> TransferPool:
        return TransferPool(
            name,
            place_count,
            min_bytes_per_s=self._config.min_transfer_bytes_per_s,
            max_waiting_per_caller=self._config.max_streams_per_device,
            displaced=partial(self._refuse, refusal=CROWDED),
        )

    def submit(
        self, run: Callable[..., Any], respond: Callable[..., None], /, *arguments: Any
    ) -> None:
        """Accept a call from gRPC, without blocking its thread."""
        call = IncomingCall(run, respond, arguments, self._config.stall_timeout_s)
        if call.route.audience is Audience.CREDENTIAL:
            known = self._gatekeeper.recognize(call.metadata)
            if known is None:
                call.caller = host_of(call.peer_address)
                call.task = partial(self._introduce, call)
                self._enqueue(self._anonymous, call)
            else:
                self._await_known(call, known)
        else:
            call.caller = host_of(call.peer_address)
            self._await_messages(call, self._strangers, self._pool_of_stranger(call))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Stop the threads; part of the executor interface that gRPC expects."""
        self._stopped.set()
        self._supervisor.join()
        for pool in self._pools():
            pool.close()

    def _pools(self) -> tuple[FairPool, ...]:
        return (
            self._health,
            self._reflection,
            self._anonymous,
            self._updates,  # before the pool that it hands calls to
            self._devices,
            self._administrators,
            self._admin_streams,
            self._uploads,
            self._downloads,
        )

    def _introduce(self, call: IncomingCall) -> None:
        """Look up an unknown token; a call without a valid token is refused before its message arrives."""
        known = self._gatekeeper.introduce(call.metadata)
        call.task = call.answer
        if known is None:
            call.answer()
        else:
            self._await_known(call, known)

    def _await_known(self, call: IncomingCall, known: KnownCaller) -> None:
        call.caller = known.name
        if call.route.request_streaming and not self._take_stream(call):
            return
        self._await_messages(call, self._known, partial(self._pool_of_known, known))

    def _take_stream(self, call: IncomingCall) -> bool:
        """Count a stream of a caller until it ends; return False and refuse the call if the caller has too many."""
        try:
            self._limits.take("up", call.caller)
        except errors.TooManyRequestsError as error:
            self._refuse(call, Refusal.from_error(error))
            return False
        release = partial(self._limits.release, "up", call.caller)
        if not call.on_end(release):
            release()
        return True

    def _await_messages(
        self,
        call: IncomingCall,
        table: HalfOpenCalls,
        pool_of: Callable[[IncomingCall], FairPool],
    ) -> None:
        call.deadline_at = time.monotonic() + self._first_message_s
        evicted = table.add(call)
        if evicted is not None:
            self._refuse(evicted, CROWDED)
        call.receive(partial(self._progressed, table, pool_of))

    def _progressed(
        self,
        table: HalfOpenCalls,
        pool_of: Callable[[IncomingCall], FairPool],
        call: IncomingCall,
    ) -> None:
        """Check a call after each of its messages, and queue it once a thread can handle it."""
        if not self._is_ready(call):
            call.deadline_at = time.monotonic() + self._config.stall_timeout_s
            return
        call.leave()
        if not table.remove(call) or call.is_over:
            return
        if table is self._strangers and call.moved_bytes > MAX_STRANGER_BYTES:
            self._refuse(call, TOO_LARGE)
            return
        if not self._answer(call):
            self._enqueue(pool_of(call), call)

    def _is_ready(self, call: IncomingCall) -> bool:
        """Return whether a call is ready for a thread: its request is complete, or its stream has begun to transfer.

        A stream that may be a small update is received completely first, so that it needs no transfer slot.
        """
        messages = call.messages
        if messages.ending is not None:
            return True
        if call.route.kind != "client_stream":
            return messages.held_count > 0
        is_large = messages.held_count > 1 and messages.received_bytes > self._small_stream_bytes
        return is_large or messages.held_count >= READ_AHEAD

    def _pool_of_stranger(self, call: IncomingCall) -> Callable[[IncomingCall], FairPool]:
        pools = {Audience.HEALTH: self._health, Audience.REFLECTION: self._reflection}
        pool = pools.get(call.route.audience, self._anonymous)
        return lambda _call: pool

    def _pool_of_known(self, known: KnownCaller, call: IncomingCall) -> FairPool:
        whole = not call.route.request_streaming or call.messages.ending is not None
        short = whole and not call.route.response_streaming
        if not known.is_device:
            return self._administrators if short else self._admin_streams
        if short and self._together is not None and self._together.takes(call):
            return self._updates
        if short:
            return self._devices
        return self._downloads if call.route.response_streaming else self._uploads

    def _enqueue(self, pool: FairPool, call: IncomingCall) -> None:
        if pool is self._uploads:
            call.before_message = self._let_pass
        elif pool is self._devices or pool is self._updates:
            self._short.begin()
            if not call.on_end(self._short.end):  # the caller has canceled
                self._short.end()
        if not pool.put(call):
            self._refuse(call, CROWDED)

    def _let_pass(self) -> None:
        self._short.wait_until_none(LONGEST_PAUSE_S)

    def _refuse(self, call: IncomingCall, refusal: Refusal) -> None:
        call.refuse(refusal)
        self._refused[refusal.reason] += 1
        route = call.route
        self._telemetry.call_started(route.method, route.kind)
        self._telemetry.call_handled(
            route.method,
            route.kind,
            refusal.code.name,
            time.monotonic() - call.began_at,
            refusal.reason,
        )

    def _supervise(self) -> None:
        ticks = 0
        while not self._stopped.wait(TICK_S):
            ticks += 1
            try:
                self._tick(is_review=ticks % REVIEW_TICKS == 0)
            except Exception:
                logger.exception("supervision of calls failed; continuing")

    def _tick(self, *, is_review: bool) -> None:
        now = time.monotonic()
        for table in (self._strangers, self._known):
            for call in table.take_overdue(now):
                self._refuse(call, STALLED)
        if is_review:
            for transfers in (self._uploads, self._downloads, self._reflection):
                transfers.review(now)
            self._log_refused()

    def _log_refused(self) -> None:
        """Log the number of calls refused without a thread, at most one line per second."""
        if self._refused:
            refused, self._refused = self._refused, Counter()
            counts = " ".join(f"{reason}={count}" for reason, count in sorted(refused.items()))
            logger.warning("calls refused while waiting: %s", counts)


def host_of(peer_address: str) -> str:
    """Return the caller to which a gRPC address is charged: an IPv4 address, or the /64 network of an IPv6 address."""
    kind, _, rest = peer_address.partition(":")
    return network_of(unquote(rest).rpartition(":")[0].strip("[]")) or kind
