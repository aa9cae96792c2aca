"""What tests of uploads share: sizes, streams that break, and refusals that may write nothing."""

from collections.abc import Iterator

import pytest

from qflare.v1 import training_pb2
from qflare_server.errors import (
    QflareError,
)
from qflare_server.storage.tables import AuditLog, ModelUpdate, Payload
from tests.support.use_cases import CoordinatorHarness, Draft

WAIT_S = 30.0
QUORUM_4 = training_pb2.RoundPolicy(quorum=4)
BIG = 700_000  # elements: three chunks of float32
WRITTEN = (ModelUpdate, Payload, AuditLog)


def refuse(core: CoordinatorHarness, draft: Draft, error: type[QflareError]) -> QflareError:
    """Send an update that is refused; nothing may have been written."""
    before = [core.count(model) for model in WRITTEN]

    with pytest.raises(error) as caught:
        core.send(draft)

    assert [core.count(model) for model in WRITTEN] == before
    return caught.value


class BrokenError(Exception):
    """The stream ends in the middle, as when the connection is lost."""


def broken(draft: Draft, count: int) -> Iterator[tuple[int, bytes]]:
    yield from draft.chunks[:count]
    raise BrokenError


def unread() -> Iterator[tuple[int, bytes]]:
    """A stream that must not be read."""
    yield from iter(_fail, None)


def _fail() -> tuple[int, bytes] | None:
    raise AssertionError("read a payload in vain")
