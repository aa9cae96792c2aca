"""Inputs of a divided pass: all that another coordinator needs to compute a slice, and the proof of who computed it.

The inputs name the updates by the digests that the leader has checked against their signatures, so that a row that is
altered afterwards is noticed wherever it is read. A result is authenticated under a key that the coordinators share and
that no database holds: whoever can write to the database or to the payload store cannot slip a sum in.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from qflare.crypto.symmetric import hkdf_expand, mac
from qflare_server.aggregation.plan import RoundPlan
from qflare_server.context import Context
from qflare_server.storage.repository.fold_slices import SliceLease
from qflare_server.storage.repository.updates import AcceptedUpdate
from qflare_server.strategies import (
    Outcome,
    PassName,
    UpdateAssessment,
    outcome_from_data,
    outcome_to_data,
)
from qflare_server.strategies.blocks import BLOCK, GRAM_BLOCK

FORMAT: Final = 1
"""Number of the format of the inputs and of what a slice means; others leave slices of another one alone."""
ELEMENT_BYTES: Final = 8
NORM_FIGURES: Final = 3
_KEY_INFO: Final = b"qflare/v1/fold slice key"


class ChangedInputsError(Exception):
    """The rows are not those that the leader has checked. Never sent over the wire."""


@dataclass(frozen=True)
class PassUpdate:
    """An update as the leader has checked it."""

    update_id: str
    payload_digest: str
    base_version: int

    @classmethod
    def of(cls, update: AcceptedUpdate) -> "PassUpdate":
        """Return it from its row."""
        return cls(update.update_id, update.payload_digest, update.base_version)


@dataclass(frozen=True)
class PassInputs:
    """Inputs of a pass.

    Attributes:
        name: The pass.
        training_session_id: Training session.
        round_number: The closed round.
        base_version: Version that the round trained from.
        base_digest: Digest of that version's stored payload.
        vector_digests: Digests of the stored state of its strategy, by name.
        config_digest: Digest of the configuration that the leader plans under.
        revision: Number of the rules to aggregate by.
        last_sequence: Acceptance sequence of the last update.
        updates: Those that are aggregated, in acceptance order.
        judgements: One for each update, in the same order.
    """

    name: PassName
    training_session_id: str
    round_number: int
    base_version: int
    base_digest: str
    vector_digests: Mapping[str, str]
    config_digest: str
    revision: int
    last_sequence: int
    updates: tuple[PassUpdate, ...]
    judgements: tuple[UpdateAssessment, ...]

    @classmethod
    def of(
        cls,
        name: PassName,
        plan: RoundPlan,
        revision: int,
        last_sequence: int,
        updates: Mapping[str, PassUpdate],
        judgements: Sequence[UpdateAssessment],
    ) -> "PassInputs":
        """Return the inputs of a pass from the state of a fold."""
        return cls(
            name=name,
            training_session_id=plan.training_session_id,
            round_number=plan.number,
            base_version=plan.base_version,
            base_digest=plan.base.digest,
            vector_digests=vector_digests(plan),
            config_digest=config_digest(plan),
            revision=revision,
            last_sequence=last_sequence,
            updates=tuple(updates[entry.update_id] for entry in judgements),
            judgements=tuple(judgements),
        )

    def to_json(self) -> bytes:
        """Return them as JSON that keeps every bit of the numbers."""
        outcome = Outcome(self.name, self.judgements, 0.0)
        data = {
            **{name: getattr(self, name) for name in _PLAIN},
            "updates": [list(asdict(update).values()) for update in self.updates],
            "judgements": outcome_to_data(outcome)["judgements"],
        }
        return json.dumps(data, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "PassInputs":
        """Read the output of `to_json`.

        Raises:
            ValueError: It is not.
        """
        fields: dict[str, Any] = json.loads(data)
        try:
            outcome = outcome_from_data({**_EMPTY_OUTCOME, "judgements": fields["judgements"]})
            updates = tuple(PassUpdate(*row) for row in fields["updates"])
            plain = {name: fields[name] for name in _PLAIN}
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the inputs of a pass: {error!r}") from error
        return cls(**plain, updates=updates, judgements=outcome.judgements)

    @property
    def unit_values(self) -> int:
        """Number of float64 values that belong together: one element, or the figures of all updates in one block."""
        accepted = sum(entry.accepted for entry in self.judgements)
        return {"aggregate": 1, "norms": accepted * NORM_FIGURES, "products": accepted**2}[
            self.name
        ]

    def value_count(self, lease: SliceLease) -> int:
        """Return the number of float64 values in the result of a slice."""
        length = lease.end_element - lease.first_element
        unit_elements = {"aggregate": 1, "norms": BLOCK, "products": GRAM_BLOCK}[self.name]
        return -(-length // unit_elements) * self.unit_values

    def require(self, plan: RoundPlan) -> None:
        """Check that a plan is the one that the leader works under.

        Raises:
            ChangedInputsError: It is not.
        """
        stated = (self.base_digest, self.vector_digests, self.config_digest)
        if stated != (plan.base.digest, vector_digests(plan), config_digest(plan)):
            raise ChangedInputsError("another base version or configuration")


_PLAIN: Final = (
    "name",
    "training_session_id",
    "round_number",
    "base_version",
    "base_digest",
    "vector_digests",
    "config_digest",
    "revision",
    "last_sequence",
)
_EMPTY_OUTCOME: Final[Mapping[str, Any]] = {
    "strategy": "",
    "weight_sum": 0.0,
    "scalars": {},
    "clipped_fraction": 0.0,
    "noise_stddev": 0.0,
}


def vector_digests(plan: RoundPlan) -> dict[str, str]:
    """Return the digests of the strategy's stored state by name."""
    return {name: stored.digest for name, stored in plan.vectors.items()}


def config_digest(plan: RoundPlan) -> str:
    """Return the digest of the configuration of a plan, 64 hex digits."""
    return hashlib.sha256(plan.config.SerializeToString(deterministic=True)).hexdigest()


def authenticator(
    context: Context, inputs: bytes, first_element: int, end_element: int, digest: str
) -> bytes:
    """Return the MAC of a slice's result, 32 bytes.

    Args:
        context: The coordinator's parts.
        inputs: JSON of the pass.
        first_element: First element of the slice.
        end_element: One past its last element.
        digest: Digest of the stored payload of the result.
    """
    key = hkdf_expand(context.state_key, _KEY_INFO)
    stated = [hashlib.sha256(inputs).hexdigest(), first_element, end_element, digest]
    return mac(key, json.dumps(stated).encode())
