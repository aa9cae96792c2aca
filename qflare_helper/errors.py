"""Refusals of a helper, each with a machine-readable reason."""

from collections.abc import Mapping
from typing import ClassVar


class HelperError(Exception):
    """Base class of refusals; the message is sent to the coordinator and holds no secret."""

    reason: ClassVar[str] = "REFUSED"


class InvalidRequestError(HelperError):
    """A request is malformed, or a statement in it does not verify."""

    reason = "INVALID_REQUEST"


class UntrustedKeysetError(HelperError):
    """The keyset in a request does not follow from the pinned root keys, or is older than one seen before."""

    reason = "UNTRUSTED_KEYSET"


class PolicyError(HelperError):
    """The policy of this helper does not allow the request."""

    reason = "POLICY"


class SmallCohortError(HelperError):
    """There are fewer updates than a sum must have."""

    reason = "SMALL_COHORT"


class OverlapError(HelperError):
    """An update, or another one of its device in the same round, is in a set that was answered before."""

    reason = "OVERLAPPING_SET"


class RolledBackError(HelperError):
    """The coordinator has seen a higher counter: the database of this helper was restored from a backup."""

    reason = "ROLLED_BACK"


class BusyError(HelperError):
    """Too many requests are in progress."""

    reason = "BUSY"


class NoiseUnavailableError(HelperError):
    """The task wants noise of this helper, and it cannot draw any, or has deleted that of an answered set."""

    reason = "NOISE_UNAVAILABLE"


class RefusedMembersError(HelperError):
    """Updates whose seed cannot be used; without them the request may be repeated.

    Args:
        reasons: Reasons by update id.
    """

    reason = "REFUSED_MEMBERS"

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(f"{len(reasons)} updates cannot be used")
        self.reasons = dict(reasons)


class StoreError(HelperError):
    """The keys or the database of this helper cannot be used. The message is printed or logged, never sent."""

    reason = "STORE"
