"""Ledger of the queries that a device has answered: the sum of their epsilons, and which rounds were answered.

Invariants: an answer is recorded before its first byte leaves the device; a record is never removed. A round that is
repeated after a failure counts again.
"""

import math
import threading
from typing import Final

from qflare_client.errors import KeyStoreError, PrivacyBudgetExceededError
from qflare_client.keystore.store import KeyStore
from qflare_client.models.privacy_ledger import last_rounds
from qflare_client.tasks import Task

_DOCUMENT: Final = "queries.json"


class QueryLedger:
    """Answered queries of a device, kept in its key store. Thread-safe.

    Args:
        store: Key store of the device.

    Raises:
        KeyStoreError: The ledger is damaged. It is not reset, because that would forget the spent epsilon.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        facts = store.read_document(_DOCUMENT)
        try:
            self._spent = float(facts.get("spent", 0.0))
            self._rounds = last_rounds(facts)
        except (TypeError, ValueError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error

    @property
    def spent(self) -> float:
        """Sum of the epsilons of all answered queries."""
        with self._lock:
            return self._spent

    def record(self, task: Task, budget: float) -> None:
        """Record the answer to a query durably; call this before sending it.

        An answer to a recorded round is recorded only once: it is sent again, or refused as a duplicate.

        Args:
            task: With a query.
            budget: Largest sum of epsilons.

        Raises:
            PrivacyBudgetExceededError: The answer would exceed the budget.
            KeyStoreError: It cannot be written; then the answer must not be sent.
        """
        assert task.analytics is not None
        with self._lock:
            if task.round_number <= self._rounds.get(task.training_session_id, 0):
                return
            spent = self._spent + task.analytics.epsilon
            if not (math.isfinite(spent) and spent <= budget):
                raise PrivacyBudgetExceededError(
                    f"federated analytics: this query would bring the device to epsilon {spent:.4g} over all queries, "
                    f"the budget is {budget:g}"
                )
            rounds = {**self._rounds, task.training_session_id: task.round_number}
            self._store.write_document(_DOCUMENT, {"spent": spent, "rounds": rounds})
            self._spent, self._rounds = spent, rounds
