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

from qflare_client.admin.profile import Profile, read_profile, write_profile
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
    expired = provider.sign(provider.claims(sub="alice", exp=provider.claims()["iat"] - 60))
    write_profile(shell.path, replace(first, token=expired))
    assert shell.run("device", "list").returncode == 0
    refreshed = read_profile(shell.path)
    assert refreshed.token not in {expired, ""}

    assert shell.run("logout").returncode == 0
    left = read_profile(shell.path)
    assert (left.token, left.refresh_token) == ("", "")
    assert shell.run("device", "list").returncode == 2
    write_profile(shell.path, replace(refreshed, token=expired))
    ended = shell.run("device", "list")
    assert (ended.returncode, "ended the log-in" in ended.stderr) == (4, True), ended.stderr


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
