"""A device's policy for secure aggregation: what a task must require, whatever the coordinator says.

    policy = SecureAggregation(min_cohort=5, helper_key_ids={"3f..."}, metrics={"loss"})
    client = Client(home="device", secure_aggregation=policy)

A client with a policy refuses every training task that asks for less: one without secure aggregation, one with a
smaller minimum of updates in a sum, one whose masks would be known to no pinned helper, one that wants other metrics,
or one with less noise. Updates that were kept before the policy was set are dropped unless they are masked for a pinned
helper, with that noise. Evaluations state one example and only metrics of `evaluation_metrics`, because nothing masks
them.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from qflare.evidence.unmasking import Masking, NeighborPolicy
from qflare.masking.noise import DEVICES, MAX_MULTIPLIER, MissingSamplerError, require_sampler
from qflare.v1 import security_pb2
from qflare_client import arguments
from qflare_client.errors import InsufficientTaskError, InvalidArgumentError, UnsupportedTaskError
from qflare_client.tasks import Task

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MAX_COHORT: Final = 1_000_000


@dataclass(frozen=True)
class SecureAggregation:
    """What a device requires of secure aggregation."""

    min_cohort: int
    """Fewest updates in a sum with this device's, 2 or more."""

    helper_key_ids: Collection[str] = frozenset()
    """Key ids of trusted helpers, 64 hex digits each, one or more unless `neighbors` is set. At least one helper of a
    task must be among them: one that does not collude with the coordinator suffices."""

    metrics: Collection[str] = frozenset()
    """Training metrics that may leave the device, masked."""

    evaluation_metrics: Collection[str] = frozenset()
    """Metrics that may leave the device with evaluations, not masked. Without any, evaluation tasks are refused."""

    neighbors: bool = False
    """Whether tasks with neighbors instead of helpers are allowed. Without `helper_key_ids`, helpers are refused."""

    corrupt_fraction: float = 0.0
    """Least share of the other devices that a task with neighbors must allow to collude with the coordinator."""

    noise_multiplier: float = 0.0
    """Least noise multiplier of the noise that devices or helpers add to the sum, so that the coordinator never holds
    the exact one. 0 allows tasks without such noise."""

    def __post_init__(self) -> None:
        """Refuse values that require nothing.

        Raises:
            InvalidArgumentError: A field is out of range, or no helper is named.
        """
        arguments.whole("min_cohort", self.min_cohort, 2, _MAX_COHORT)
        for name in ("helper_key_ids", "metrics", "evaluation_metrics"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        arguments.flag("neighbors", self.neighbors)
        arguments.not_negative("corrupt_fraction", self.corrupt_fraction, 1.0)
        arguments.not_negative("noise_multiplier", self.noise_multiplier, MAX_MULTIPLIER)
        if not all(map(_DIGEST.fullmatch, self.helper_key_ids)):
            raise InvalidArgumentError("helper_key_ids: want key ids of 64 hex digits")
        if not self.helper_key_ids and not self.neighbors:
            raise InvalidArgumentError("helper_key_ids: want one or more, or neighbors=True")

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a policy from a TOML file with the fields of this class.

        Raises:
            InvalidArgumentError: The file cannot be read, or has an unknown or invalid entry.
        """
        return cls(**arguments.policy(path, cls.__dataclass_fields__, {"min_cohort"}))

    def require(self, task: Task) -> None:
        """Refuse a training task that asks for less than this policy.

        Raises:
            InsufficientTaskError: It does; the message says in what.
        """
        masking = task.masking
        if masking is None:
            raise InsufficientTaskError(
                "the task has no secure aggregation, which this device requires"
            )
        if masking.min_cohort < self.min_cohort:
            raise InsufficientTaskError(
                f"the task allows sums of {masking.min_cohort} updates; this device requires {self.min_cohort}"
            )
        if masking.neighbors is not None:
            self._require_neighbors(masking.neighbors)
        elif not any(helper.helper_id in self.helper_key_ids for helper in masking.helpers):
            raise InsufficientTaskError("no helper of the task is one that this device trusts")
        if masking.noise_multiplier < self.noise_multiplier:
            raise InsufficientTaskError(
                f"devices or helpers add noise of a multiplier of {masking.noise_multiplier:g} to the sum; this device "
                f"requires {self.noise_multiplier:g}"
            )
        wanted = sorted(masking.parameters.metrics.keys() - set(self.metrics))
        if wanted:
            raise InsufficientTaskError(
                f"the task wants metric {wanted[0][:100]!r}, which may not leave this device"
            )

    def _require_neighbors(self, policy: NeighborPolicy) -> None:
        if not self.neighbors:
            raise InsufficientTaskError(
                "the task has neighbors instead of a helper, which this device does not allow"
            )
        if policy.corrupt_fraction < self.corrupt_fraction:
            raise InsufficientTaskError(
                f"the task withstands a share of {policy.corrupt_fraction:g} of corrupt devices; this device requires "
                f"{self.corrupt_fraction:g}"
            )

    def allows_kept(self, statement: security_pb2.UpdateStatement) -> bool:
        """Return whether an update that was made before may still leave the device.

        It may if it was masked for a trusted helper, and for a task with enough noise.
        """
        if statement.masking.noise_multiplier < self.noise_multiplier:
            return False
        if statement.masking.HasField("neighbors"):
            return self.neighbors
        return any(seed.helper_id in self.helper_key_ids for seed in statement.masking.seeds)

    def disclosed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return those metrics of an evaluation that may leave the device.

        Raises:
            InsufficientTaskError: None may.
        """
        allowed = {
            name: value for name, value in metrics.items() if name in self.evaluation_metrics
        }
        if not allowed:
            raise InsufficientTaskError("no metric of the evaluation may leave this device")
        return allowed


def require_pinned(masking: Masking | None, helper_key_ids: Collection[str]) -> None:
    """Refuse a task with secure aggregation whose helpers a bootstrap bundle does not name.

    Raises:
        InsufficientTaskError: None of them is pinned.
    """
    if masking is None or masking.neighbors is not None or not helper_key_ids:
        return
    if not any(helper.helper_id in helper_key_ids for helper in masking.helpers):
        raise InsufficientTaskError("no helper of the task is one that the bootstrap bundle names")


def require_noise(masking: Masking | None) -> None:
    """Refuse a task whose noise this device cannot draw, before anything is trained for it.

    Raises:
        UnsupportedTaskError: The sampler is not installed.
    """
    noise = None if masking is None else masking.parameters.noise
    if noise is None or noise.source != DEVICES:
        return
    try:
        require_sampler()
    except MissingSamplerError as error:
        raise UnsupportedTaskError(str(error)) from error


def _texts(name: str, value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise InvalidArgumentError(f"{name}: got {type(value).__name__}, want a collection of str")
    return frozenset(arguments.text(name, item) for item in value)
