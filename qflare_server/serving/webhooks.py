"""Threads that deliver webhooks: one for each receiver, so that a slow one delays no other."""

import logging
import threading
from collections.abc import Sequence
from typing import Final

from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.use_cases.webhooks.delivery import POLL_S, Delivery

logger = logging.getLogger(__name__)

MAX_REST_S: Final = 60.0
STOP_S: Final = 5.0
"""A connection that is being made cannot be ended; its thread then ends with the process."""


class WebhookThreads:
    """The threads of all configured receivers; none without `QFLARE_WEBHOOK_URLS`.

    Args:
        context: The coordinator's components.
        holder: Name of this process among the coordinators.

    Raises:
        ConfigError: The file of the authorities cannot be used.
        KeyStoreError: The secret cannot be read, or is open to others.
    """

    def __init__(self, context: Context, holder: str) -> None:
        self._deliveries: Sequence[Delivery] = [
            Delivery(context, url, holder) for url in context.config.webhook_receivers
        ]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(delivery,), name="webhook", daemon=True)
            for delivery in self._deliveries
        ]

    def start(self) -> None:
        """Give new receivers their place in the log, and start the threads.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        for delivery in self._deliveries:
            delivery.prepare()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the requests under way and the threads; what is not delivered is delivered after the next start."""
        self._stop.set()
        for delivery in self._deliveries:
            delivery.sender.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_S)

    def _run(self, delivery: Delivery) -> None:
        wait_s, rest_s = 0.0, POLL_S
        while not self._stop.wait(wait_s):
            try:
                wait_s, rest_s = delivery.run_once(), POLL_S
            except QflareError as error:
                logger.warning("webhook %s deferred: %s", delivery.place, error)
                wait_s = rest_s = min(2 * rest_s, MAX_REST_S)
            except Exception:
                logger.exception("webhook %s failed; it is tried again", delivery.place)
                wait_s = rest_s = min(2 * rest_s, MAX_REST_S)
