"""The parts of a request to a helper: updates come alone or several in one."""

from collections.abc import Iterator

import pytest

from qflare.v1 import helper_service_pb2 as messages
from qflare.v1 import security_pb2
from qflare_helper.errors import InvalidRequestError
from qflare_helper.exchange import MAX_MEMBERS, contents_of

Request = messages.UnmaskRequest


def member(number: int) -> messages.UnmaskMember:
    return messages.UnmaskMember(statement=envelope(number))


def envelope(number: int) -> security_pb2.SignedEnvelope:
    return security_pb2.SignedEnvelope(payload=bytes([number % 251]))


def together(*numbers: int) -> Request:
    return Request(members=messages.UnmaskMembers(members=map(member, numbers)))


def test_updates_come_alone_or_several_in_a_part() -> None:
    parts = [
        Request(earlier_task=envelope(9)),
        together(0, 1),
        Request(member=member(2)),
        together(3),
    ]
    assert list(contents_of(iter(parts))) == [envelope(9), *map(member, range(4))]
    most = together(*range(MAX_MEMBERS))
    assert len(list(contents_of(iter([most])))) == MAX_MEMBERS


@pytest.mark.parametrize(
    "part",
    [
        together(),
        together(*range(MAX_MEMBERS + 1)),
        Request(header=messages.UnmaskHeader()),
        Request(),
    ],
)
def test_other_parts_are_refused(part: Request) -> None:
    def parts() -> Iterator[Request]:
        yield together(0)
        yield part

    found = contents_of(parts())
    assert next(found) == member(0)
    with pytest.raises(InvalidRequestError):
        next(found)
