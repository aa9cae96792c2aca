"""One exchange with a coordinator: the parts of a request in, the parts of the response out.

Where the parts come from is up to the caller: `service` takes them from gRPC, a simulation from its own program.
"""

import logging
from collections.abc import Generator, Iterator
from typing import Final

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_helper.errors import InvalidRequestError, RefusedMembersError
from qflare_helper.unmasking import Call, Unmasking

logger = logging.getLogger(__name__)

MAX_MEMBERS: Final = 256
"""Most updates of one part of a request."""


def header_of(parts: Iterator[messages.UnmaskRequest]) -> messages.UnmaskHeader:
    """Return the first part of a request.

    Raises:
        InvalidRequestError: It is no header.
    """
    first = next(parts, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidRequestError("the first part of a request is its header")
    return first.header


def respond(
    unmasking: Unmasking, call: Call, parts: Iterator[messages.UnmaskRequest]
) -> Generator[messages.UnmaskResponse, None, str]:
    """Answer a request whose header was verified; return the outcome: answered, checked or updates_refused.

    Args:
        unmasking: Answers requests.
        call: The verified header.
        parts: The other parts of the request.

    Raises:
        HelperError: A subclass: it is refused.
    """
    try:
        answer = unmasking.answer(call, contents_of(parts))
    except RefusedMembersError as error:
        yield _refused(error.reasons)
        return "updates_refused"
    if answer is None:
        yield _refused({})
        return "checked"
    yield messages.UnmaskResponse(
        answer=messages.UnmaskAnswer(answer=answer.envelope, latest=answer.latest)
    )
    for chunk in answer.chunks:
        yield messages.UnmaskResponse(chunk=chunk)
    return "answered"


def contents_of(
    parts: Iterator[messages.UnmaskRequest],
) -> Iterator[messages.UnmaskMember | security_pb2.SignedEnvelope]:
    """Yield the earlier tasks and the updates of a request.

    Args:
        parts: Those after the header.

    Raises:
        InvalidRequestError: While iterating: a part is a second header, is empty, or has too many updates.
    """
    for part in parts:
        match part.WhichOneof("part"):
            case "members":
                yield from _members(part.members)
            case "member":
                yield part.member
            case "earlier_task":
                yield part.earlier_task
            case _:
                raise InvalidRequestError("after the header of a request come tasks and updates")


def _members(part: messages.UnmaskMembers) -> Iterator[messages.UnmaskMember]:
    """Yield the updates of a part."""
    if not 1 <= len(part.members) <= MAX_MEMBERS:
        raise InvalidRequestError(
            f"a part has {len(part.members)} updates, want 1 to {MAX_MEMBERS}"
        )
    yield from part.members


def _refused(reasons: dict[str, str]) -> messages.UnmaskResponse:
    for update_id, reason in reasons.items():
        logger.warning("update refused: %s: %s", update_id, reason)
    members = [
        messages.RefusedMember(update_id=update_id, reason=reason)
        for update_id, reason in reasons.items()
    ]
    return messages.UnmaskResponse(refused=messages.RefusedMembers(members=members))
