"""Page context: visitor, request parameters and use cases."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

from starlette.datastructures import QueryParams

from qflare_server.errors import InvalidRequestError
from qflare_server.serving.dashboard.cache import DashboardCache
from qflare_server.storage.paging import PageRequest
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.access.authentication import Principal
from qflare_server.use_cases.access.dashboard_login import may_call

Kind = TypeVar("Kind", bound=StrEnum)
MAX_TEXT = 300
MAX_DIGITS = 9


@dataclass(frozen=True)
class PageContext:
    """Input of a page: visitor, parameters and use cases."""

    use_cases: UseCases
    recent: DashboardCache
    principal: Principal
    path: Mapping[str, str]
    query: QueryParams
    at: datetime
    draining: bool = False

    def may(self, method: str) -> bool:
        """Return whether the visitor's roles allow a method of the admin service."""
        return may_call(self.principal, method)

    def text(self, name: str) -> str:
        """Return a query parameter; empty if absent.

        Raises:
            InvalidRequestError: It is too long, or no text of a database.
        """
        return _checked(name, self.query.get(name, ""))

    def part(self, name: str) -> str:
        """Return a part of the path.

        Raises:
            InvalidRequestError: It is too long, or no text of a database.
        """
        return _checked(name, self.path[name])

    def texts(self, name: str, at_most: int) -> list[str]:
        """Return the values of the query under a name, each once, in their order.

        Raises:
            InvalidRequestError: There are too many, or one is too long.
        """
        values = list(dict.fromkeys(self.query.getlist(name)))
        if len(values) > at_most:
            raise InvalidRequestError(f"{name}: got {len(values)}, want at most {at_most}")
        if any(len(value) > MAX_TEXT or "\0" in value for value in values):
            raise InvalidRequestError(f"{name}: longer than {MAX_TEXT}, or holds NUL", field=name)
        return values

    def one_of(self, name: str, kind: type[Kind]) -> str:
        """Return a query parameter that is a value of an enum; empty if absent.

        Raises:
            InvalidRequestError: It is not a value of the enum.
        """
        value = self.text(name)
        if value and value not in {item.value for item in kind}:
            raise InvalidRequestError(f"{name}: got {value[:40]!r}", field=name)
        return value

    def rows(self, count: int) -> PageRequest:
        """Return the requested rows of a list."""
        return PageRequest(count, self.text("page"))


def _checked(name: str, value: str) -> str:
    if len(value) > MAX_TEXT or "\0" in value:
        raise InvalidRequestError(f"{name}: longer than {MAX_TEXT}, or holds NUL", field=name)
    return value


def whole(text: str, name: str) -> int:
    """Return a number from the path.

    Raises:
        InvalidRequestError: It is not a number of up to nine digits.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise InvalidRequestError(f"{name}: got {text[:40]!r}, want a number", field=name)
    return int(text)
