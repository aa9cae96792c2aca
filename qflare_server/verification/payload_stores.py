"""Verifies that every payload in a payload store is present and has the digests of its row."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.payloads.reader import check_chunks
from qflare_server.storage.payload_records import describe
from qflare_server.storage.records import Payload
from qflare_server.storage.repository import payloads

PAGE: Final = 100


class PayloadVerdict(NamedTuple):
    """Result for one payload.

    Attributes:
        payload_id: Payload.
        store: Its payload store.
        size_bytes: Its size.
        problem: What is wrong; empty if nothing is.
    """

    payload_id: str
    store: str
    size_bytes: int
    problem: str


def verify_payloads(context: Context) -> Iterator[PayloadVerdict]:
    """Yield a verdict for every payload whose chunks are in a payload store, in bounded memory.

    Payloads that are pruned meanwhile are left out.
    """
    after = ""
    while True:
        with context.database.read() as session:
            page = payloads.in_stores(session, None, after, PAGE)
        for row in page:
            problem = _problem(context, row)
            if not problem or _still_there(context, row.id):
                yield PayloadVerdict(row.id, row.store or "", row.size_bytes, problem)
        if len(page) < PAGE:
            return
        after = page[-1].id


def _still_there(context: Context, payload_id: str) -> bool:
    with context.database.read() as session:
        return payloads.chunks_of(session, payload_id) is not None


def _problem(context: Context, row: Payload) -> str:
    stored = describe(row)
    try:
        check_chunks(context, stored)
    except QflareError as error:
        return str(error)
    return ""
