"""Privacy ledger of local differential privacy: the rounds with a released update, and the epsilon spent.

Without it, a coordinator that repeats a task and refuses every update would receive the same delta with new noise each
time, and could average the noise away. A device therefore releases one update per round of a training session, in
ascending order of rounds. The epsilon of all releases, over all training sessions and restarts, is charged to a budget.

Invariants: a release is recorded before its first byte leaves the device; a record is never removed, whether the update
is accepted or not.

It does not keep the bytes of a release for resending (see `qflare_client.models.outbox`), or count updates that are
sent without local privacy.
"""

import math
import threading
from collections.abc import Mapping
from typing import Any, Final

from qflare_client.errors import KeyStoreError, PrivacyBudgetExceededError, RepeatedTaskError
from qflare_client.keystore.store import KeyStore
from qflare_client.privacy import LocalPrivacy, gaussian_epsilon
from qflare_client.tasks import Task

_DOCUMENT: Final = "privacy.json"


class PrivacyLedger:
    """Releases of a device, kept in its key store. Thread-safe.

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
            self._rounds = last_rounds(facts)
            self._release_count = int(facts.get("release_count", 0))
            self._without_noise_count = int(facts.get("without_noise_count", 0))
            self._spent = float(facts.get("spent", 0.0))
        except (TypeError, ValueError) as error:
            raise KeyStoreError(f"{store.home / _DOCUMENT} is damaged: {error!r}") from error

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of all releases so far; infinite if one had no noise.

        Args:
            delta: Within (0, 1).

        Raises:
            ValueError: It is out of its range.
        """
        with self._lock:
            return self._epsilon(self._spent, delta)

    def require(self, task: Task, privacy: LocalPrivacy) -> None:
        """Check that an update may be released for a task.

        Raises:
            RepeatedTaskError: An update was already released for this round or a later one of its training session.
            PrivacyBudgetExceededError: The update would exceed the budget.
        """
        with self._lock:
            self._require(task, privacy)

    def record(self, task: Task, privacy: LocalPrivacy) -> None:
        """Record a release durably; call this before sending the update.

        Raises:
            RepeatedTaskError: As `require`.
            PrivacyBudgetExceededError: As `require`.
            KeyStoreError: It cannot be written; then the update must not be sent.
        """
        with self._lock:
            self._require(task, privacy)
            self._store.write_document(
                _DOCUMENT,
                {
                    "rounds": {**self._rounds, task.training_session_id: task.round_number},
                    "release_count": self._release_count + 1,
                    "without_noise_count": self._without_noise_count + privacy.is_without_noise,
                    "spent": self._spent + privacy.cost,
                },
            )
            self._rounds[task.training_session_id] = task.round_number
            self._release_count += 1
            self._without_noise_count += privacy.is_without_noise
            self._spent += privacy.cost

    def _require(self, task: Task, privacy: LocalPrivacy) -> None:
        last = self._rounds.get(task.training_session_id, 0)
        if task.round_number <= last:
            raise RepeatedTaskError(
                f"local privacy: round {task.round_number} of training session "
                f"{task.training_session_id} comes again; an update was released for round {last}"
            )
        if privacy.max_epsilon is None:
            return
        epsilon = self._epsilon(self._spent + privacy.cost, privacy.delta)
        if not epsilon <= privacy.max_epsilon:
            raise PrivacyBudgetExceededError(
                f"local privacy: this update would bring the device to epsilon {epsilon:.4g} at "
                f"delta {privacy.delta:g} over {self._release_count + 1} releases, "
                f"the budget is {privacy.max_epsilon:g}"
            )

    def _epsilon(self, spent: float, delta: float) -> float:
        return math.inf if self._without_noise_count else gaussian_epsilon(math.sqrt(spent), delta)


def last_rounds(facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the last recorded round of each training session in a ledger's document.

    Raises:
        TypeError, ValueError: It is damaged.
    """
    rounds = dict(facts.get("rounds", {}))
    return {str(session_id): int(number) for session_id, number in rounds.items()}
