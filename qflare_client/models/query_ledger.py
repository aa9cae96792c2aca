"""Ledger of the queries that a device has answered: the sum of their epsilons, and the task answered last of each.

Invariants: an answer is recorded before its first byte leaves the device; its epsilon is never given back. A round that
is repeated after a failure counts again, and so does another signed task, whatever round it says it is of: a
coordinator that asks something else in the name of an answered round gets nothing for nothing.
"""

import math
import threading
from typing import Final

from qflare_client.errors import KeyStoreError, PrivacyBudgetExceededError
from qflare_client.keystore.store import KeyStore
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
            self._tasks = {
                str(key): str(task) for key, task in dict(facts.get("tasks", {})).items()
            }
        except (TypeError, ValueError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error

    @property
    def spent(self) -> float:
        """Sum of the epsilons of all answered queries."""
        with self._lock:
            return self._spent

    def require(self, task: Task, budget: float) -> None:
        """Check that the answer to a query is within the budget, or is recorded already.

        Args:
            task: With a query.
            budget: Largest sum of epsilons.

        Raises:
            PrivacyBudgetExceededError: It would exceed the budget.
        """
        with self._lock:
            self._after(task, budget)

    def record(self, task: Task, budget: float) -> None:
        """Record the answer to a query durably; call this before sending it.

        An answer to the recorded task is recorded only once: it is sent again, or refused as a duplicate.

        Args:
            task: With a query.
            budget: Largest sum of epsilons.

        Raises:
            PrivacyBudgetExceededError: The answer would exceed the budget.
            KeyStoreError: It cannot be written; then the answer must not be sent.
        """
        assert task.analytics is not None
        with self._lock:
            spent = self._after(task, budget)
            if spent is None:
                return
            tasks = {**self._tasks, task.training_session_id: task.analytics.task_digest}
            self._store.write_document(_DOCUMENT, {"spent": spent, "tasks": tasks})
            self._spent, self._tasks = spent, tasks

    def _after(self, task: Task, budget: float) -> float | None:
        """Return the sum of the epsilons with the answer to a query; None if the answer is recorded."""
        assert task.analytics is not None
        if self._tasks.get(task.training_session_id) == task.analytics.task_digest:
            return None
        spent = self._spent + task.analytics.epsilon
        if not (math.isfinite(spent) and spent <= budget):
            raise PrivacyBudgetExceededError(
                f"federated analytics: this query would bring the device to epsilon {spent:.4g} over all queries, "
                f"the budget is {budget:g}"
            )
        return spent
