"""Devices whose uploads crawl make room for others, and go on later from what was stored."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import select

from qflare.v1 import training_pb2
from qflare_client import Client, Receipt
from qflare_server.storage.tables import Upload

Deploy = Callable[..., Any]
CRAWLERS: Final = 4
PLACES: Final = 2
CHUNK_S: Final = 4.0
"""A crawling device sends a chunk of 1 MiB each time: its update alone would hold a place for a minute and a half."""
LARGE: Final = {"w": np.zeros(6 * 2**20, np.float32)}
PATIENCE_S: Final = 30.0
ROUNDS: Final = training_pb2.RoundPolicy(quorum=CRAWLERS + 1, deadline=Duration(seconds=600))


class Crawl:
    """A progress hook that lets a device send a chunk every few seconds, until it may hurry."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self._hurry = threading.Event()

    def __call__(self, what: str, _done_bytes: int, _total_bytes: int) -> None:
        """Wait before the next chunk."""
        if what == "upload":
            self.begun.release()
            self._hurry.wait(CHUNK_S)

    def hurry(self) -> None:
        """Let the devices send as fast as they can."""
        self._hurry.set()


def submit(client: Client, session_id: str) -> Receipt:
    """Send a large update."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    return client.submit(task, base, LARGE, 10, {"loss": 0.5})


def kept_chunks(deployment: Any) -> int:
    """Return how many chunks of unfinished uploads are stored."""
    parts = deployment.coordinator.parts
    with parts.database.read() as session:
        names = session.scalars(select(Upload.payload_id)).all()
    return sum(parts.context.store.stored_count(name) for name in names)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: places know nothing of databases."""
    return sqlite_url


@pytest.mark.slow
def test_crawling_uploads_make_room_and_are_resumed(deploy: Deploy) -> None:
    deployment = deploy(max_uploads=PLACES, min_transfer_bytes_per_s=2.0**21)
    session_id = deployment.session(LARGE, rounds=ROUNDS, total_rounds=1)
    honest, crawl = deployment.device("honest"), Crawl()
    homes = [deployment.folder / f"crawling-{number}" for number in range(CRAWLERS)]
    for home in homes:
        deployment.device(home.name).close()
    crawling = [Client(home=home, progress=crawl) for home in homes]

    with ThreadPoolExecutor(CRAWLERS) as pool:
        try:
            receipts: list[Future[Receipt]] = [
                pool.submit(submit, client, session_id) for client in crawling
            ]
            for _ in range(PLACES + 1):
                assert crawl.begun.acquire(timeout=PATIENCE_S)
            began = time.monotonic()
            assert submit(honest, session_id).update_id
            assert time.monotonic() - began < PATIENCE_S
            assert kept_chunks(deployment) > 0
            assert not any(receipt.done() for receipt in receipts)
        finally:
            crawl.hurry()
        assert len({receipt.result(3 * PATIENCE_S).update_id for receipt in receipts}) == CRAWLERS
    for client in crawling:
        client.close()
