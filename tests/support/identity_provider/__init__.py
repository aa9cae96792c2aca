"""A real OpenID Connect provider on loopback, and a user who fills in its forms."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from html import unescape
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlencode, urljoin
from urllib.request import (
    HTTPCookieProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    urlopen,
)

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

FOLDER: Final = Path(__file__).parent
INSTALLED: Final = FOLDER.parents[2] / ".tools" / "identity-provider"
SECRET: Final = "test-secret-of-the-dashboard"
RESOURCE: Final = "https://qflare.test"
MAX_STEPS: Final = 20
_FIELD: Final = re.compile(r"<input[^>]*>", re.IGNORECASE)


class IdentityProvider:
    """An `oidc-provider` process, started at once.

    Args:
        lifetime_s: Of its tokens, in seconds.
        port: 0 takes a free one.
        certificates: Folder of `qflare-server certificates make`, to serve https.
    """

    def __init__(
        self, lifetime_s: int = 3600, port: int = 0, certificates: Path | None = None
    ) -> None:
        node = shutil.which("node")
        if node is None or not (INSTALLED / "node_modules" / "oidc-provider").is_dir():
            pytest.skip("needs Node.js and `make .tools/.identity-provider`")
        self.key = RSAKey.generate_key(2048, {"kid": "test", "use": "sig", "alg": "RS256"})
        self.tls: SSLContext | None = None
        pem = {}
        if certificates is not None:
            pem = {
                "key": (certificates / "server.key").read_text(),
                "cert": (certificates / "server.pem").read_text(),
            }
            self.tls = create_default_context(cafile=certificates / "ca.pem")
        program = [node, str(FOLDER / "provider.mjs"), str(INSTALLED)]
        self._process = subprocess.Popen(
            [*program, str(lifetime_s), str(port), self._jwks(), json.dumps(pem) if pem else ""],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("serving "), line
        self.issuer = line.removeprefix("serving ").strip()

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.issuer.rpartition(":")[2])

    def settings(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Return the settings of a coordinator for this provider; the client's secret is written to a file."""
        secret_file = folder / "client.secret"
        if not secret_file.exists():
            secret_file.touch(0o600)
            secret_file.write_text(SECRET)
        return {
            "oidc_issuer": self.issuer,
            "oidc_algorithms": "RS256",
            "oidc_client_id": "dashboard",
            "oidc_client_secret_file": secret_file,
            "oidc_command_line_client_id": "command-line",
            "oidc_roles_claim": "realm_access.roles",
            "oidc_roles": "fl-admins=admin,fl-viewers=viewer",
            **more,
        }

    def set_roles(self, name: str, *roles: str) -> None:
        """Set what the roles claim of a user says."""
        self.ask("/test/roles", json.dumps({name: roles}).encode())

    def rotate_key(self, key_id: str) -> None:
        """Sign with a new key from now on, and publish no other."""
        self.key = RSAKey.generate_key(2048, {"kid": key_id, "use": "sig", "alg": "RS256"})
        self.ask("/test/keys", self._jwks().encode())

    def keep_pace(self, interval_s: int) -> None:
        """Say how often the device flow may poll; answer the first poll, and any that is too early, with slow_down."""
        self.ask("/test/pace", json.dumps({"interval": interval_s, "hurried": 0}).encode())

    @property
    def hurried_count(self) -> int:
        """How often slow_down was answered."""
        return int(self.ask("/test/pace")["hurried"])

    def ask(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        """Return the JSON of a path; with data, post it."""
        with urlopen(Request(self.issuer + path, data), timeout=30, context=self.tls) as answer:
            values: dict[str, Any] = json.loads(answer.read())
            return values

    def _jwks(self) -> str:
        return json.dumps({"keys": [self.key.as_dict(private=True)]})

    def requests(self, path: str) -> int:
        """Return how often a path was asked for."""
        return int(self.ask("/test/requests").get(path, 0))

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Return the claims of an administrator's ID token; None leaves a claim out."""
        now = int(time.time())
        whole = {
            "iss": self.issuer,
            "sub": "mallory",
            "aud": "command-line",
            "iat": now,
            "exp": now + 600,
            "realm_access": {"roles": ["fl-admins"]},
            **changed,
        }
        return {name: value for name, value in whole.items() if value is not None}

    def sign(self, claims: Mapping[str, Any], **header: Any) -> str:
        """Return a token that this provider's key signs."""
        token: str = jwt.encode(
            {"alg": "RS256", "kid": self.key.kid, **header}, dict(claims), self.key
        )
        return token

    def stop(self) -> None:
        """End it; ending it twice is no error."""
        self._process.terminate()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class _Stops(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Leave every redirect to the user."""


class User:
    """Follows the pages of a provider like a browser of one person, and types the name into its forms."""

    def __init__(self, provider: IdentityProvider, name: str) -> None:
        self._provider = provider
        self._name = name
        policy = DefaultCookiePolicy(rfc2965=False)
        cookies = HTTPCookieProcessor(CookieJar(policy))
        self._opener = build_opener(_Stops, cookies, HTTPSHandler(context=provider.tls))

    def follow(self, url: str) -> str:
        """Open a page and send its forms until the provider asks nothing more; return where it then sends the user.

        Returns:
            The address outside of the provider; empty if the last page has no form.
        """
        form: dict[str, str] | None = None
        for _ in range(MAX_STEPS):
            target, page = self._open(url, form)
            if target and not target.startswith(self._provider.issuer):
                return target
            if target:
                url, form = target, None
                continue
            action = re.search(r'<form[^>]*action="([^"]*)"', page)
            if action is None:
                return ""
            url, form = urljoin(url, unescape(action[1])), self._filled_in(page)
        raise AssertionError("the provider asks without an end")

    def _filled_in(self, page: str) -> dict[str, str]:
        fields = {}
        for tag in _FIELD.findall(page):
            name, value = _attribute(tag, "name"), _attribute(tag, "value")
            if name:
                fields[name] = {"login": self._name, "password": "any"}.get(name, value)
        return fields

    def _open(self, url: str, form: Mapping[str, str] | None) -> tuple[str, str]:
        """Return where a page sends the user, or empty, and its text."""
        data = None if form is None else urlencode(form).encode()
        try:
            with self._opener.open(Request(url, data), timeout=30) as answer:
                return "", answer.read().decode()
        except HTTPError as error:
            with error:
                if error.code in {302, 303, 307}:
                    return urljoin(url, error.headers["Location"]), ""
                raise AssertionError(f"{url}: {error.code} {error.read()[:500]!r}") from error


def device_tokens(
    provider: IdentityProvider, name: str, client_id: str = "command-line", resource: str = ""
) -> dict[str, Any]:
    """Return the tokens that a user gets by the device authorization grant."""
    wanted = {"resource": resource} if resource else {}
    begun = provider.ask(
        "/device/auth",
        urlencode({"client_id": client_id, "scope": "openid", **wanted}).encode(),
    )
    User(provider, name).follow(begun["verification_uri_complete"])
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "client_id": client_id,
        "device_code": begun["device_code"],
        **wanted,
    }
    return provider.ask("/token", urlencode(form).encode())


def _attribute(tag: str, name: str) -> str:
    found = re.search(rf'\b{name}="([^"]*)"', tag)
    return unescape(found[1]) if found else ""
