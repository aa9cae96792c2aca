"""States of rounds with neighbors that an earlier release has written: read by this one, and left alone."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

from qflare_client.keystore.store import KeyStore
from qflare_client.models import neighbor_rounds

FIRST = {"round_number": 1, "task_digest": "00", "secrets": "01", "advertisement": "02"}
"""What the first release wrote that has rounds with neighbors, besides what has a default."""


def test_the_state_of_an_earlier_release_is_read_and_counts_as_copied(tmp_path: Path) -> None:
    with KeyStore(tmp_path) as store:
        store.write_secret("neighbors-session", json.dumps(FIRST).encode())

        state = neighbor_rounds._read(store, "session")

        assert state is not None
        assert state.task_digest == FIRST["task_digest"]
        assert state.place != store.place


def test_what_was_added_to_a_state_has_a_default() -> None:
    needed = {
        item.name
        for item in fields(neighbor_rounds._State)
        if item.default is MISSING and item.default_factory is MISSING
    }

    assert needed == set(FIRST)
