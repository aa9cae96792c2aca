"""Keyset pagination: constant cost per page, and every page fits into one message.

A page ends with the number of rows that was asked for, or before the row with which its message would outgrow
`MAX_PAGE_BYTES`. A page token is opaque to callers. It holds the sort key of the last row and a digest of that key and
the filters, so that a token is refused by any other query, and a modified one by all.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Select, and_, or_

from qflare_server.errors import InvalidRequestError

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
MAX_INTEGER: Final = 2**63 - 1
MAX_PAGE_BYTES: Final = 2 * 2**20
"""Most bytes of a page's rows as messages, unless its first row alone has more: half of what a gRPC peer takes."""
MAX_HELD_BYTES: Final = 32 * 2**20
"""Most bytes of a page's rows in memory, keys and statements that are not sent included."""
PROBE_ROWS: Final = DEFAULT_PAGE_SIZE
"""Rows of the first batch, from which the size of a list's rows is estimated."""
_TEXT_OVERHEAD: Final = 8
_NUMBER_BYTES: Final = 12
_TIME_BYTES: Final = 20
Row = TypeVar("Row", bound=Iterable[Any])


@dataclass(frozen=True)
class PageRequest:
    """Size and position of a page.

    Args:
        size: 1 to 1,000; 0 means 50.
        token: `next_token` of the previous page; empty means the first page.
    """

    size: int = 0
    token: str = ""

    @property
    def limit(self) -> int:
        """Number of rows of the page.

        Raises:
            InvalidRequestError: The size is out of range.
        """
        if not 0 <= self.size <= MAX_PAGE_SIZE:
            raise InvalidRequestError(
                f"page_size: got {self.size}, want 0 to {MAX_PAGE_SIZE}", field="page_size"
            )
        return self.size or DEFAULT_PAGE_SIZE

    def after(self, *filters: object, kinds: Sequence[type] = ()) -> list[Any] | None:
        """Return the sort key after which the page begins; None for the first page.

        Args:
            filters: Those of the query.
            kinds: Types of the parts of the key; `datetime` for a time as ISO 8601 text. The digest in a token is no
                secret, so a caller can forge a token with arbitrary contents.

        Raises:
            InvalidRequestError: The token belongs to another query, or was modified.
        """
        if not self.token:
            return None
        try:
            stated, *key = json.loads(base64.urlsafe_b64decode(self.token.encode()))
        except (ValueError, TypeError, RecursionError) as error:
            raise _bad_token() from error
        if not key or stated != _digest([*filters, key]):
            raise _bad_token()
        if kinds and not (len(key) == len(kinds) and all(map(_is_of_kind, key, kinds))):
            raise _bad_token()
        return list(key)


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Rows of one page, and the token of the next page; empty on the last page."""

    rows: Sequence[Row]
    next_token: str


@dataclass(frozen=True)
class Order(Generic[Row]):
    """Sort order of a list; the sort key of a page's last row is the start of the next page.

    Attributes:
        kinds: Types of the parts of a key, as `PageRequest.after` takes them.
        key_of: Returns the key of a row.
        later: Returns the condition for the rows after a key.
        extra_bytes: Most bytes that a row's message holds beside the row's own columns.
        probe_rows: Rows that are read first; fewer where a row may have megabytes.
    """

    kinds: tuple[type, ...]
    key_of: Callable[[Row], Sequence[str | int]]
    later: Callable[[Sequence[Any]], ColumnElement[bool]]
    extra_bytes: int = 0
    probe_rows: int = PROBE_ROWS


def read_page(
    read: Callable[[Select[Any]], Sequence[Row]],
    query: Select[Any],
    request: PageRequest,
    order: Order[Row],
    *scope: object,
) -> Page[Row]:
    """Return the rows of a page.

    The batch size follows from the size of the rows read so far, so that few rows are read and then discarded.

    Args:
        read: Runs a query.
        query: Selects the rows of the list in its order, without a limit.
        request: Which page.
        order: The list's order.
        scope: Name of the list and its filters, to which tokens are bound.

    Raises:
        InvalidRequestError: The size is out of range, or the token is not one of this list.
    """
    key = request.after(*scope, kinds=order.kinds)
    rows: list[Row] = []
    page = _Room(order.extra_bytes)
    count = min(order.probe_rows, request.limit)
    while True:
        batch = read((query if key is None else query.where(order.later(key))).limit(count + 1))
        for row in batch[:count]:
            if not page.takes(row) and rows:
                return Page(rows, page_token(order.key_of(rows[-1]), *scope))
            rows.append(row)
        if len(batch) <= count:
            return Page(rows, "")
        key = list(order.key_of(rows[-1]))
        if len(rows) >= request.limit:
            return Page(rows, page_token(key, *scope))
        count = min(page.expected_rows(), request.limit - len(rows))
        if not count:
            return Page(rows, page_token(key, *scope))


class _Room:
    """Tracks the remaining capacity of a page."""

    def __init__(self, extra_bytes: int) -> None:
        self._extra_bytes = extra_bytes
        self._sent, self._held = MAX_PAGE_BYTES, MAX_HELD_BYTES
        self._count = 0

    def takes(self, row: Iterable[Any]) -> bool:
        """Count a row; return whether it fits."""
        self._count += 1
        values = list(row)
        self._sent -= self._extra_bytes + sum(map(sent_bytes, values))
        self._held -= sum(len(value) for value in values if isinstance(value, bytes))
        return self._sent >= 0 and self._held >= 0

    def expected_rows(self) -> int:
        """Estimate how many more rows fit, from the mean size of the rows so far."""
        sent, held = MAX_PAGE_BYTES - self._sent, MAX_HELD_BYTES - self._held
        return min(
            max(self._sent, 0) * self._count // max(sent, 1),
            max(self._held, 0) * self._count // max(held, 1),
        )


def fitting_count(rows: Sequence[Iterable[Any]], extra_bytes: int = 0) -> int:
    """Return how many of the first rows fit into `MAX_PAGE_BYTES`, with `extra_bytes` beside each row's columns."""
    sizes = accumulate(extra_bytes + sum(map(sent_bytes, row)) for row in rows)
    return sum(size <= MAX_PAGE_BYTES for size in sizes)


def sent_bytes(value: object) -> int:
    """Return an upper bound on the bytes of a column's value in a message; no list has binary columns."""
    if isinstance(value, str):
        return _TEXT_OVERHEAD + len(value.encode(errors="surrogatepass"))
    if isinstance(value, Mapping):
        entries = value.items()
        return sum(_TEXT_OVERHEAD + sent_bytes(key) + sent_bytes(held) for key, held in entries)
    if isinstance(value, Message):
        return _TEXT_OVERHEAD + value.ByteSize()
    if isinstance(value, (list, tuple)):
        return sum(_TEXT_OVERHEAD + sent_bytes(item) for item in value)
    if isinstance(value, bytes):
        return 0
    return _TIME_BYTES if isinstance(value, datetime) else _NUMBER_BYTES


def page_token(key: Sequence[str | int], *filters: object) -> str:
    """Return the token of the page after the row with this sort key."""
    text = json.dumps([_digest([*filters, list(key)]), *key])
    return base64.urlsafe_b64encode(text.encode()).decode()


def earlier(
    at: ColumnElement[Any], number: ColumnElement[Any], key: Sequence[Any]
) -> ColumnElement[bool]:
    """Return the condition for rows after a key, in descending order of time and then id.

    The first half bounds the index range: with the OR alone, the index is read from the newest row on.
    """
    moment = datetime.fromisoformat(key[0])
    return and_(at <= moment, or_(at < moment, number < key[1]))


def _digest(filters: Sequence[object]) -> str:
    return hashlib.sha256(repr(filters).encode()).hexdigest()[:16]


def _is_of_kind(part: object, kind: type) -> bool:
    """Return whether a part of a key can be compared with a column of its type."""
    if kind is int:
        return type(part) is int and -MAX_INTEGER - 1 <= part <= MAX_INTEGER
    if not isinstance(part, str) or not part.isprintable():
        return False
    if kind is not datetime:
        return True
    try:
        return datetime.fromisoformat(part).tzinfo is not None
    except ValueError:
        return False


def _bad_token() -> InvalidRequestError:
    return InvalidRequestError("page_token: not a token of this query", field="page_token")
