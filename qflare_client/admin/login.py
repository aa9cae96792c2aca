"""Log in with an OpenID Connect provider: `qflare-admin login` and `qflare-admin logout`.

The device authorization grant (RFC 8628) works without a browser on this machine: the command shows an address and a
code. The tokens are kept in the profile, and the one for the coordinator is refreshed a minute before it expires.
"""

import argparse
import base64
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from ssl import SSLContext
from typing import Any, Final

from qflare.files import make_private_folder, private_opener
from qflare.openid import (
    Answer,
    ProviderError,
    ProviderMetadata,
    ProviderUnreachableError,
    discover,
    request_json,
    trust,
)
from qflare_client.admin.output import note
from qflare_client.admin.profile import (
    Profile,
    ProfileError,
    profile_path,
    read_profile,
    write_profile,
)

GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
EARLY_S: Final = 60
"""A token that expires within this time is refreshed first."""
POLL_S: Final = 5.0
SLOWER_S: Final = 5.0
MAX_WAIT_S: Final = 900.0
OFFLINE: Final = "openid offline_access"


class LoginError(Exception):
    """The provider did not log the user in.

    Args:
        message: Why.
        remedy: What to do.
    """

    def __init__(self, message: str, *, remedy: str = "qflare-admin login") -> None:
        super().__init__(message)
        self.remedy = remedy


class ProviderAwayError(LoginError):
    """The provider cannot be reached."""


def add(commands: Any) -> None:
    """Add the commands of this topic."""
    entering = commands.add_parser(
        "login",
        help="log in with an OpenID Connect provider; the profile keeps the tokens",
        epilog="example:\n  qflare-admin login --issuer https://id.example.org --client-id qflare-admin",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    entering.add_argument("--issuer", help="URL of the provider, kept in the profile")
    entering.add_argument("--client-id", help="public client at the provider, kept in the profile")
    entering.add_argument(
        "--resource",
        help="ask for an access token for this resource (RFC 8707) instead of an ID token",
    )
    entering.add_argument(
        "--issuer-ca", dest="issuer_ca_file", help="PEM certificate authorities of the provider"
    )
    entering.set_defaults(offline=run_login)
    leaving = commands.add_parser(
        "logout",
        help="revoke and forget the tokens of login",
        epilog="example:\n  qflare-admin logout",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    leaving.set_defaults(offline=run_logout)


def run_login(options: argparse.Namespace) -> None:
    """Log in, and write the tokens into the profile."""
    path = profile_path(os.environ)
    names = ("issuer", "client_id", "resource", "issuer_ca_file")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given.get("issuer_ca_file"):
        given["issuer_ca_file"] = str(Path(given["issuer_ca_file"]).expanduser().absolute())
    profile = replace(read_profile(path), **given)
    if not profile.issuer or not profile.client_id:
        raise ProfileError(
            "no provider: give --issuer and --client-id once",
            remedy="qflare-admin login --issuer URL --client-id ID",
        )
    tls = _trust(profile)
    with _translated():
        metadata = discover(profile.issuer, tls)
        answer = _device_login(profile, metadata, tls)
    with _locked(path):
        write_profile(path, _with_tokens(replace(profile, token_file=""), answer))
    note(f"logged in; wrote {path}")


def run_logout(_options: argparse.Namespace) -> None:
    """Forget the tokens; ask the provider to revoke them."""
    path = profile_path(os.environ)
    with _locked(path):
        profile = read_profile(path)
        if not profile.issuer:
            raise ProfileError("not logged in with a provider", remedy="qflare-admin login")
        write_profile(path, replace(profile, token="", refresh_token=""))
    try:
        with _translated():
            _revoke(profile)
    except LoginError as error:
        note(f"the provider still has the log-in: {error}")
    note("logged out")


def refreshed(profile: Profile, path: Path) -> Profile:
    """Return a profile whose token is valid for another minute, as far as it can be refreshed.

    Args:
        profile: With a token of `run_login`; with any other, such as that of QFLARE_TOKEN, it is returned unchanged.
        path: Of the profile's file, which gets the new tokens. If another process has refreshed them, those are taken.

    Raises:
        LoginError: The provider has ended the log-in, or the file has none and the token has expired.
        ProviderAwayError: The provider cannot be reached, and the token has expired.
    """
    if not _is_due(profile, EARLY_S):
        return profile
    with _locked(path):
        stored = read_profile(path)
        if stored.token and stored.refresh_token and not _is_due(stored, EARLY_S):
            return replace(profile, token=stored.token, refresh_token=stored.refresh_token)
        try:
            fresh = _refresh(stored)
        except ProviderAwayError:
            if _is_due(profile, 0):
                raise
            return profile
        write_profile(path, fresh)
    return replace(profile, token=fresh.token, refresh_token=fresh.refresh_token)


def _is_due(profile: Profile, early_s: float) -> bool:
    if not profile.refresh_token or not profile.token or not profile.issuer:
        return False
    return _expires_at(profile.token) - time.time() <= early_s


def _refresh(profile: Profile) -> Profile:
    if not profile.refresh_token:
        raise LoginError("logged out")
    tls = _trust(profile)
    form = {
        "grant_type": "refresh_token",
        "client_id": profile.client_id,
        "refresh_token": profile.refresh_token,
        **_resource(profile),
    }
    with _translated():
        answer = request_json(discover(profile.issuer, tls).token_endpoint, tls, form)
    if answer.status != HTTPStatus.OK:
        raise LoginError(f"the provider has ended the log-in: {_reason(answer)}")
    return _with_tokens(profile, answer)


def _revoke(profile: Profile) -> None:
    tls = _trust(profile)
    endpoint = discover(profile.issuer, tls).revocation_endpoint
    if not profile.refresh_token:
        return
    if not endpoint:
        raise LoginError("it offers no revocation")
    form = {"token": profile.refresh_token, "client_id": profile.client_id}
    try:
        request_json(endpoint, tls, form)
    except ProviderUnreachableError:
        raise
    except ProviderError:
        return  # the answer of a revocation is empty


def _device_login(profile: Profile, metadata: ProviderMetadata, tls: SSLContext) -> Answer:
    if not metadata.device_authorization_endpoint:
        raise LoginError(
            "the provider has no device authorization endpoint",
            remedy="enable the device authorization grant of the client, or use an admin token",
        )
    form = {"client_id": profile.client_id, "scope": OFFLINE, **_resource(profile)}
    begun = request_json(metadata.device_authorization_endpoint, tls, form)
    code = begun.values.get("device_code")
    if begun.status != HTTPStatus.OK or not isinstance(code, str):
        raise LoginError(f"the provider refused: {_reason(begun)}")
    address = begun.values.get("verification_uri")
    note(f"open {_shown(address)} and enter {_shown(begun.values.get('user_code'))}")
    whole = begun.values.get("verification_uri_complete")
    if whole:
        note(f"or open {_shown(whole)}")
    form = {"grant_type": GRANT, "client_id": profile.client_id, "device_code": code}
    return _poll(metadata.token_endpoint, tls, form | _resource(profile), begun.values)


def _poll(
    endpoint: str, tls: SSLContext, form: Mapping[str, str], begun: Mapping[str, Any]
) -> Answer:
    interval_s = _number(begun.get("interval"), POLL_S)
    give_up_at = time.monotonic() + min(_number(begun.get("expires_in"), MAX_WAIT_S), MAX_WAIT_S)
    waiting = threading.Event()
    while time.monotonic() < give_up_at:
        waiting.wait(interval_s)
        answer = request_json(endpoint, tls, form)
        if answer.status == HTTPStatus.OK:
            return answer
        reason = answer.values.get("error")
        if reason == "slow_down":
            interval_s += SLOWER_S
        elif reason != "authorization_pending":
            raise LoginError(f"the provider refused: {_reason(answer)}")
    raise LoginError("the code was not entered in time")


def _with_tokens(profile: Profile, answer: Answer) -> Profile:
    name = "access_token" if profile.resource else "id_token"
    token = answer.values.get(name, "")
    if not isinstance(token, str) or not _expires_at(token):
        raise LoginError(
            f"the provider gave no {name} that is a JWT",
            remedy="a provider that issues JWTs; --resource asks for an access token",
        )
    refresh_token = answer.values.get("refresh_token", profile.refresh_token)
    return replace(profile, token=token, refresh_token=str(refresh_token))


def _expires_at(token: str) -> float:
    """Return when a JWT expires, in seconds since 1970; 0 if it is none. The coordinator verifies it."""
    try:
        claims = token.split(".")[1]
        values = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return float(values["exp"])
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        return 0.0


def _resource(profile: Profile) -> dict[str, str]:
    return {"resource": profile.resource} if profile.resource else {}


def _trust(profile: Profile) -> SSLContext:
    name = profile.issuer_ca_file
    return trust(Path(name) if name else None)


def _number(value: object, default: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return max(1.0, float(value)) if is_number else default  # type: ignore[arg-type]


def _reason(answer: Answer) -> str:
    values = answer.values
    return _shown(values.get("error_description") or values.get("error") or answer.status)


def _shown(value: object) -> str:
    """Return a provider's text as one line without control characters."""
    return "".join(char if char.isprintable() else "?" for char in str(value))[:300]


@contextmanager
def _translated() -> Iterator[None]:
    """Raise errors of the provider as those of this command."""
    try:
        yield
    except ProviderUnreachableError as error:
        raise ProviderAwayError(
            f"the identity provider cannot be reached: {error}",
            remedy="repeat the command later, or use an admin token",
        ) from error
    except ProviderError as error:
        raise LoginError(str(error), remedy="check --issuer and --issuer-ca") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other commands from changing a profile: a refresh token can often be used only once."""
    make_private_folder(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "w", opener=private_opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
