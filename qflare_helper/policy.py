"""Policy of a helper: the training sessions that it serves, and how many updates of whom a sum must have.

The file `policy.toml` in the helper's folder holds it; the operator of the helper edits it, and it is read for each
request, so that a change needs no restart. A file that cannot be read refuses every request.
"""

import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qflare.masking.noise import MAX_MULTIPLIER
from qflare_helper.errors import PolicyError

FILE: Final = "policy.toml"
LEAST_COHORT: Final = 2
MOST_COHORT: Final = 1_000_000
_KEYS: Final = frozenset({"min_cohort", "training_sessions", "roster", "noise_multiplier"})
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")

TEXT: Final = """\
# Policy of this helper for secure aggregation. It is read for each request.

# Fewest updates in a sum, 2 or more.
min_cohort = {min_cohort}

# Ids of the training sessions that this helper serves. An empty list means all of the deployment.
training_sessions = []

# Ids of the signature keys of the devices that count towards min_cohort. An empty list means every enrolled device;
# then whoever enrolls devices can fill a sum around one of them.
roster = []

# Least noise multiplier of the noise that this helper, or the devices, must add to a sum. 0 requires none.
noise_multiplier = 0.0
"""


@dataclass(frozen=True)
class Policy:
    """What a helper answers.

    Attributes:
        min_cohort: Fewest counted updates in a sum, 2 or more.
        training_sessions: Ids of the training sessions that it serves; empty means all.
        roster: Ids of the signature keys whose updates count; empty means all. A device that rotates its keys stays
            in it.
        noise_multiplier: Least noise multiplier of noise that helpers or devices add to a sum; 0 requires none.
    """

    min_cohort: int
    training_sessions: frozenset[str] = frozenset()
    roster: frozenset[str] = frozenset()
    noise_multiplier: float = 0.0

    def require_session(self, training_session_id: str) -> None:
        """Refuse a training session that this helper does not serve.

        Raises:
            PolicyError: It is not in the list.
        """
        if self.training_sessions and training_session_id not in self.training_sessions:
            raise PolicyError("this helper does not serve the training session")

    def require_noise(self, noise_multiplier: float) -> None:
        """Refuse a task with less noise in the sum than this helper requires.

        Args:
            noise_multiplier: Of the noise that helpers or devices add; 0 for none.

        Raises:
            PolicyError: It is less.
        """
        if noise_multiplier < self.noise_multiplier:
            raise PolicyError(
                f"the noise multiplier of the sum is {noise_multiplier:g}, want at least {self.noise_multiplier:g}"
            )

    def counts(self, key_ids: Collection[str]) -> bool:
        """Return whether the update of a device counts.

        Args:
            key_ids: Ids of the device's signature keys, current and earlier.
        """
        return not self.roster or not self.roster.isdisjoint(key_ids)


def write_policy(folder: Path, min_cohort: int) -> None:
    """Write the policy of a new helper."""
    (folder / FILE).write_text(TEXT.format(min_cohort=min_cohort), "utf-8")


def read_policy(folder: Path) -> Policy:
    """Read the policy.

    Raises:
        PolicyError: It cannot be read, or has an unknown or invalid entry.
    """
    try:
        entries = tomllib.loads((folder / FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{FILE} cannot be read") from error
    unknown = sorted(entries.keys() - _KEYS)
    if unknown:
        raise PolicyError(f"{FILE}: unknown entry {unknown[0][:64]}")
    least = entries.get("min_cohort")
    if not isinstance(least, int) or isinstance(least, bool):
        raise PolicyError(f"{FILE}: min_cohort is no whole number")
    if not LEAST_COHORT <= least <= MOST_COHORT:
        raise PolicyError(f"{FILE}: min_cohort: got {least}, want {LEAST_COHORT} to {MOST_COHORT}")
    roster = _texts(entries, "roster")
    if not all(_DIGEST.fullmatch(key_id) for key_id in roster):
        raise PolicyError(f"{FILE}: roster: want key ids of 64 hex digits")
    return Policy(least, _texts(entries, "training_sessions"), roster, _noise(entries))


def _noise(entries: dict[str, Any]) -> float:
    value = entries.get("noise_multiplier", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(f"{FILE}: noise_multiplier is no number")
    if not 0 <= value <= MAX_MULTIPLIER:
        raise PolicyError(f"{FILE}: noise_multiplier: got {value:g}, want 0 to {MAX_MULTIPLIER:g}")
    return float(value)


def _texts(entries: dict[str, Any], name: str) -> frozenset[str]:
    listed = entries.get(name, [])
    if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
        raise PolicyError(f"{FILE}: {name} is no list of texts")
    return frozenset(listed)
