"""Keyset pagination: every page costs the same, however deep.

A page token is opaque to callers. It holds the sort key of the last row and a digest of that key and the filters, so
that a token is refused by any other query, and a modified one by all.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import ColumnElement, and_, or_

from qflare_server.errors import InvalidRequestError

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
MAX_INTEGER: Final = 2**63 - 1
Row = TypeVar("Row")


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
                secret, so a caller can make one with whatever it likes in it.

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
