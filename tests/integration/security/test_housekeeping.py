"""Housekeeping deletes what has expired until nothing is left of it, however much one device has piled up."""

import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest
from sqlalchemy import func, insert, select

from qflare_server.serving.coordinator import Coordinator
from qflare_server.storage.ids import payload_name
from qflare_server.storage.tables import TokenKind, Upload, UsedNonce, UserToken

Deploy = Callable[..., Any]
COUNT: Final = 2_300
"""More than any batch of a transaction."""


def pile_up(coordinator: Coordinator) -> None:
    """Add expired tokens, nonces and unfinished uploads."""
    old = coordinator.parts.context.clock() - timedelta(days=30)
    tokens = [
        {
            "id": uuid.uuid4().hex,
            "token_hash": uuid.uuid4().hex,
            "kind": TokenKind.ACCESS.value,
            "subject": "device",
            "roles": [],
            "created_at": old,
            "expires_at": old,
        }
        for _ in range(COUNT)
    ]
    nonces = [{"nonce": uuid.uuid4().hex, "expires_at": old} for _ in range(COUNT)]
    uploads = [
        {
            "payload_id": payload_name(),
            "update_id": str(uuid.uuid4()),
            "store": "database",
            "created_at": old,
            "touched_at": old,
        }
        for _ in range(COUNT // 3)
    ]

    def work(session: Any) -> None:
        session.execute(insert(UserToken), tokens)
        session.execute(insert(UsedNonce), nonces)
        session.execute(insert(Upload), uploads)

    coordinator.parts.database.write(work)


@pytest.mark.parametrize("table", [UserToken, UsedNonce, Upload])
def test_one_pass_leaves_nothing_that_has_expired(deploy: Deploy, table: Any) -> None:
    coordinator: Coordinator = deploy().coordinator

    def count() -> int:
        with coordinator.parts.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    before = count()
    pile_up(coordinator)
    for chore in (coordinator._housekeeping._expire, coordinator._housekeeping._sweep):
        chore()

    assert count() == before
