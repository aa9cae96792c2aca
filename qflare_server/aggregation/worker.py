"""The aggregation worker: the thread that runs passes, and when."""

import logging
import threading

from qflare_server.aggregation.aggregator import COALESCE_S, MAX_DOUBLINGS, REST_S, Aggregator
from qflare_server.context import Context
from qflare_server.errors import QflareError

logger = logging.getLogger(__name__)


class AggregationWorker:
    """Background thread that runs passes: when woken, when a round is due, and periodically."""

    def __init__(self, aggregator: Aggregator, context: Context, wake: threading.Event) -> None:
        self._aggregator = aggregator
        self._context = context
        self._wake = wake
        self._stop = threading.Event()
        self._failure_count = 0
        self._thread = threading.Thread(target=self._run, name="aggregation", daemon=True)

    def start(self) -> None:
        """Start the thread; a stop requested before is not lost."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End after the pass under way."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            delay = self._pass()
            if self._wake.wait(delay):
                self._stop.wait(COALESCE_S)
                self._wake.clear()
        try:
            self._aggregator.close()
        except QflareError:
            logger.warning("leases were not given back; they expire by themselves")

    def _pass(self) -> float:
        """Run passes while there is more to do; return how long to wait then."""
        try:
            while self._aggregator.run_once() and not self._stop.is_set():
                pass
            due = self._aggregator.next_deadline()
        except QflareError as error:
            logger.warning("aggregation deferred: %s", error)
            return self._longer()
        except Exception:
            logger.exception("aggregation failed; it is tried again")
            return self._longer()
        self._failure_count = 0
        if due is None:
            return self._context.config.worker_poll_s
        remaining = (due - self._context.clock()).total_seconds()
        return min(max(remaining, 0.001), self._context.config.worker_poll_s)

    def _longer(self) -> float:
        """Return how long to wait after a failure: twice as long each time, so that a full disk fills no log."""
        self._failure_count = min(self._failure_count + 1, MAX_DOUBLINGS)
        return float(min(REST_S, self._context.config.worker_poll_s * 2**self._failure_count))
