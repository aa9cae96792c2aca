"""`qflare-admin login` and `logout` with a real OpenID Connect provider."""

import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from qflare_client.admin.administrator import Administrator
from qflare_client.admin.login import LoginError
from qflare_client.admin.profile import Profile, read_profile, write_profile
from qflare_server.cli.main import main
from tests.integration.conftest import Deployment
from tests.support.identity_provider import RESOURCE, IdentityProvider, User

Deploy = Callable[..., Deployment]
PROGRAM: Final = (sys.executable, "-m", "qflare_client.admin")
TIMEOUT_S: Final = 60


class CommandLine:
    """`qflare-admin` with a profile of its own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.path = folder / "home" / "profile"
        write_profile(self.path, Profile(address=address))
        kept = {name: value for name, value in os.environ.items() if name != "QFLARE_TOKEN"}
        self._environ = {**kept, "QFLARE_PROFILE": str(self.path)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return subprocess.run(
            [*PROGRAM, *arguments],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def log_in(self, user: User, *arguments: str) -> int:
        """Log in: the user opens the address that the command shows; return the exit code."""
        with subprocess.Popen(
            [*PROGRAM, "login", *arguments], env=self._environ, stderr=subprocess.PIPE, text=True
        ) as process:
            guard = threading.Timer(TIMEOUT_S, process.kill)
            guard.start()
            assert process.stderr is not None
            for line in process.stderr:
                found = re.search(r"or open (\S+)", line)
                if found:
                    user.follow(found[1])
            guard.cancel()
            return process.wait()


@pytest.fixture
def provider() -> Iterator[IdentityProvider]:
    running = IdentityProvider()
    yield running
    running.stop()


def expired(provider: IdentityProvider) -> str:
    """Return a token of alice that has expired."""
    return provider.sign(provider.claims(sub="alice", exp=provider.claims()["iat"] - 60))


def given(provider: IdentityProvider) -> tuple[str, ...]:
    return ("--issuer", provider.issuer, "--client-id", "command-line")


def test_a_log_in_is_kept_refreshed_and_ended(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-admins")
    shell = CommandLine(tmp_path, deployment.coordinator.address)

    assert shell.log_in(User(provider, "alice"), *given(provider)) == 0

    assert stat.S_IMODE(shell.path.stat().st_mode) == 0o600
    listed = shell.run("token", "list")
    assert listed.returncode == 0, listed.stderr

    first = read_profile(shell.path)
    assert first.token
    assert first.token not in shell.run("profile", "show").stdout
    old = expired(provider)
    write_profile(shell.path, replace(first, token=old))
    assert shell.run("device", "list").returncode == 0
    refreshed = read_profile(shell.path)
    assert refreshed.token not in {old, ""}

    assert shell.run("logout").returncode == 0
    left = read_profile(shell.path)
    assert (left.token, left.refresh_token) == ("", "")
    assert shell.run("device", "list").returncode == 2
    write_profile(shell.path, replace(refreshed, token=old))
    ended = shell.run("device", "list")
    assert (ended.returncode, "ended the log-in" in ended.stderr) == (4, True), ended.stderr


def test_tokens_are_refreshed_again_and_again(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-admins")
    shell = CommandLine(tmp_path, deployment.coordinator.address)
    assert shell.log_in(User(provider, "alice"), *given(provider)) == 0
    before = provider.requests("/token")
    seen = []

    for _ in range(2):
        seen.append(read_profile(shell.path))
        write_profile(shell.path, replace(seen[-1], token=expired(provider)))
        listed = shell.run("device", "list")
        assert listed.returncode == 0, listed.stderr
    seen.append(read_profile(shell.path))

    # The provider lets each refresh token be used once.
    assert len({profile.refresh_token for profile in seen}) == 3
    assert provider.requests("/token") == before + 2


def test_a_token_that_is_given_is_not_refreshed(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-admins")
    shell = CommandLine(tmp_path, deployment.coordinator.address)
    assert shell.log_in(User(provider, "alice"), *given(provider)) == 0
    kept, before = read_profile(shell.path), provider.requests("/token")
    file = tmp_path / "admin.token"
    file.touch(0o600)
    file.write_text(expired(provider))

    refused = shell.run("--token-file", str(file), "device", "list")

    assert refused.returncode == 4
    assert read_profile(shell.path) == kept
    assert provider.requests("/token") == before


def test_a_program_that_runs_for_long_refreshes_its_tokens(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-admins")
    shell = CommandLine(tmp_path, deployment.coordinator.address)
    assert shell.log_in(User(provider, "alice"), *given(provider)) == 0
    first = read_profile(shell.path)
    write_profile(shell.path, replace(first, token=expired(provider)))

    with (
        Administrator.from_profile(shell.path) as admin,
        Administrator.from_profile(shell.path) as other,
    ):
        admin.devices()
        second = read_profile(shell.path)
        other.devices()

        assert second.refresh_token != first.refresh_token
        assert read_profile(shell.path) == second
        assert shell.run("logout").returncode == 0
        admin.devices()

    write_profile(shell.path, replace(first, token=expired(provider)))
    with (
        Administrator.from_profile(shell.path) as ended,
        pytest.raises(LoginError, match="ended the log-in"),
    ):
        ended.devices()


def test_an_administrator_whose_log_in_is_gone_says_so(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    path = tmp_path / "profile"
    profile = Profile(
        deployment.coordinator.address,
        token=expired(provider),
        issuer=provider.issuer,
        client_id="command-line",
        refresh_token="any",
    )
    write_profile(path, profile)

    with Administrator.from_profile(path) as admin:
        write_profile(path, replace(profile, token="", refresh_token=""))
        with pytest.raises(LoginError, match="logged out"):
            admin.devices()


def test_a_provider_with_a_private_authority_needs_its_certificate(
    deploy: Deploy, tmp_path: Path
) -> None:
    certificates = tmp_path / "certificates"
    assert main(["certificates", "make", "--output", str(certificates)]) == 0
    provider = IdentityProvider(certificates=certificates)
    try:
        assert provider.issuer.startswith("https://")
        deployment = deploy(**provider.settings(tmp_path, oidc_ca_file=certificates / "ca.pem"))
        provider.set_roles("alice", "fl-viewers")
        shell = CommandLine(tmp_path, deployment.coordinator.address)
        refused = shell.run("login", *given(provider))
        assert (refused.returncode, "Traceback" in refused.stderr) == (3, False), refused.stderr

        words = (*given(provider), "--issuer-ca", str(certificates / "ca.pem"))
        assert shell.log_in(User(provider, "alice"), *words) == 0
        write_profile(shell.path, replace(read_profile(shell.path), token=expired(provider)))

        assert shell.run("device", "list").returncode == 0
        assert shell.run("logout").returncode == 0
    finally:
        provider.stop()


def test_a_provider_that_asks_for_patience_is_polled_more_slowly(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path))
    provider.set_roles("alice", "fl-viewers")
    provider.keep_pace(1)
    shell = CommandLine(tmp_path, deployment.coordinator.address)

    code = shell.log_in(User(provider, "alice"), *given(provider))

    assert code == 0
    assert provider.hurried_count == 1
    assert provider.requests("/token") == 2


def test_a_log_in_for_a_resource_keeps_an_access_token(
    deploy: Deploy, provider: IdentityProvider, tmp_path: Path
) -> None:
    deployment = deploy(**provider.settings(tmp_path, oidc_audience=RESOURCE))
    provider.set_roles("alice", "fl-viewers")
    shell = CommandLine(tmp_path, deployment.coordinator.address)

    code = shell.log_in(User(provider, "alice"), *given(provider), "--resource", RESOURCE)

    assert code == 0
    assert shell.run("device", "list").returncode == 0


def test_an_unreachable_provider_and_a_missing_one_are_explained(
    provider: IdentityProvider, tmp_path: Path
) -> None:
    shell = CommandLine(tmp_path, "127.0.0.1:1")
    missing = shell.run("login")
    assert (missing.returncode, "--issuer" in missing.stderr) == (2, True)

    provider.stop()
    away = shell.run("login", *given(provider))

    assert away.returncode == 3
    assert "cannot be reached" in away.stderr
    assert "Traceback" not in away.stderr
