"""A visitor of the dashboard without a browser: one request after the other, with a cookie jar of one cookie."""

import http.client
import ssl
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode, urlsplit

TIMEOUT_S: Final = 30


@dataclass(frozen=True)
class Answer:
    """What came back."""

    code: int
    headers: dict[str, str]
    text: str
    cookies: tuple[str, ...] = ()


class Visitor:
    """Asks a dashboard.

    Args:
        url: Of the dashboard.
        tls: Which server certificates to trust.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        self._parts = urlsplit(url)
        self._tls = tls
        self.cookie = ""

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request; names of headers are written with underscores."""
        place = self._parts.hostname or "", self._parts.port or 0
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection(*place, timeout=TIMEOUT_S, context=self._tls)
        else:
            connection = http.client.HTTPConnection(*place, timeout=TIMEOUT_S)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            sent["Cookie"] = self.cookie
        try:
            connection.request(method, path, body=body, headers=sent)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        if "set-cookie" in found:
            self.cookie = found["set-cookie"].partition(";")[0]
        cookies = tuple(response.headers.get_all("Set-Cookie") or ())
        return Answer(response.status, found, text, cookies)

    def get(self, path: str) -> Answer:
        """Get a page."""
        return self.ask("GET", path)

    def log_in(self, token: str, **headers: str) -> Answer:
        """Send the form with a token."""
        body = urlencode({"token": token}).encode()
        headers = {"Content_Type": "application/x-www-form-urlencoded", **headers}
        return self.ask("POST", "/login", body, **headers)
