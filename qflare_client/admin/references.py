"""References to devices and training sessions by id, beginning of an id, or name, made into ids."""

import argparse

from qflare.references import MAX_CANDIDATES, ManyMeantError, Named, choose, is_whole_id
from qflare.v1 import admin_service_pb2 as pb
from qflare_client.admin.connection import Admin
from qflare_client.errors import AmbiguousReferenceError, NotFoundError

DEVICE = "device:"
SESSION = "training_session:"


def device_id(admin: Admin, reference: str) -> str:
    """Return the id of the device that a reference means; a whole id is not looked up.

    Raises:
        NotFoundError: There is none.
        AmbiguousReferenceError: There are several.
    """
    if not reference or is_whole_id(reference):
        return reference
    request = pb.ListDevicesRequest(reference=reference)
    found = admin.collect("ListDevices", request, "devices", MAX_CANDIDATES + 1).devices
    return _chosen("device", reference, [Named(item.device_id, item.name) for item in found])


def session_id(admin: Admin, reference: str) -> str:
    """Return the id of the training session that a reference means; a whole id is not looked up.

    Raises:
        NotFoundError: There is none.
        AmbiguousReferenceError: There are several.
    """
    if not reference or is_whole_id(reference):
        return reference
    request = pb.ListTrainingSessionsRequest(reference=reference)
    answer = admin.collect("ListTrainingSessions", request, "training_sessions", MAX_CANDIDATES + 1)
    found = [Named(item.training_session_id, item.name) for item in answer.training_sessions]
    return _chosen("training session", reference, found)


def resolve(admin: Admin, options: argparse.Namespace) -> None:
    """Replace the references among a command's arguments by ids.

    Raises:
        NotFoundError: There is no such device or training session.
        AmbiguousReferenceError: A reference means several.
    """
    for name, find in (("device", device_id), ("session", session_id)):
        if getattr(options, name, None):
            setattr(options, name, find(admin, getattr(options, name)))
    for name in ("actor", "subject"):
        if getattr(options, name, None):
            setattr(options, name, _party(admin, getattr(options, name)))


def _party(admin: Admin, party: str) -> str:
    """Return an actor or a subject of audit entries with the id of what it refers to; unknown ones unchanged."""
    for kind, find in ((DEVICE, device_id), (SESSION, session_id)):
        if party.startswith(kind):
            try:
                return kind + find(admin, party.removeprefix(kind))
            except NotFoundError:
                return party
    return party


def _chosen(kind: str, reference: str, found: list[Named]) -> str:
    try:
        chosen = choose(reference, found)
    except ManyMeantError as error:
        raise AmbiguousReferenceError(f"several {kind}s: {error}") from None
    if chosen is None:
        reason = f"{kind.upper().replace(' ', '_')}_NOT_FOUND"
        message = f"no {kind} with the id or the name {reference!r} [{reason}]"
        raise NotFoundError(message, reason=reason)
    return chosen
