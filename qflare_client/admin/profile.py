"""Connection profile: the coordinator's address and the caller's token, in an INI file readable by its owner only.

The token is in the profile, or in a file that the profile names. QFLARE_PROFILE names the profile; the default is
~/.config/qflare/profile. QFLARE_TOKEN overrides the token. Files that others can read are refused.
"""

import configparser
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Final

from qflare.files import make_private_folder, new_file

SECTION: Final = "coordinator"
PROFILE_VARIABLE: Final = "QFLARE_PROFILE"
TOKEN_VARIABLE: Final = "QFLARE_TOKEN"  # noqa: S105  # a name
OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class ProfileError(Exception):
    """The profile is missing, malformed, or open to others.

    Args:
        message: The problem.
        remedy: How to solve it.
    """

    def __init__(self, message: str, *, remedy: str = "qflare-admin profile set") -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class Profile:
    """Connection settings; an empty field is not set.

    `insecure` permits plaintext with any address. Loopback addresses use plaintext by default, unless there is a CA
    file. `issuer` to `refresh_token` are those of `qflare-admin login`.
    """

    address: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    server_name: str = ""
    token: str = ""
    token_file: str = ""
    insecure: bool = False
    issuer: str = ""
    client_id: str = ""
    resource: str = ""
    issuer_ca_file: str = ""
    refresh_token: str = ""

    def secret(self) -> str:
        """Return the token.

        Raises:
            ProfileError: There is no token, or others can read its file.
        """
        if self.token:
            return self.token
        if not self.token_file:
            raise ProfileError(f"no token: run qflare-admin profile set, or set {TOKEN_VARIABLE}")
        return read_private(Path(self.token_file)).strip()


def profile_path(environ: Mapping[str, str]) -> Path:
    """Return the path of the profile."""
    named = environ.get(PROFILE_VARIABLE)
    if named:
        return Path(named)
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "qflare" / "profile"


def read_private(path: Path) -> str:
    """Return the text of a file that only its owner can read.

    Raises:
        ProfileError: It cannot be read, or others can read it.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}", remedy="check the path") from error
    if mode & OTHERS:
        raise ProfileError(
            f"{path} is open to others: run chmod 600 {path}", remedy=f"chmod 600 {path}"
        )
    return text


def read_profile(path: Path) -> Profile:
    """Return the profile in a file; an empty profile if the file does not exist.

    Raises:
        ProfileError: The profile is malformed, has an unknown name, or is readable by others.
    """
    if not path.exists():
        return Profile()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_private(path))
        values = dict(parser[SECTION]) if parser.has_section(SECTION) else {}
        insecure = parser.getboolean(SECTION, "insecure", fallback=False)
    except (configparser.Error, ValueError) as error:
        raise ProfileError(f"{path}: {error}", remedy=f"mend or delete {path}") from error
    unknown = set(values) - {item.name for item in fields(Profile)}
    if unknown:
        raise ProfileError(f"{path}: unknown name {min(unknown)}", remedy=f"mend or delete {path}")
    values.pop("insecure", None)
    return Profile(**values, insecure=insecure)


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile atomically, readable by its owner only.

    Raises:
        OSError: The folder cannot be written.
    """
    parser = configparser.ConfigParser(interpolation=None)
    parser[SECTION] = {
        item.name: str(value).lower() if isinstance(value, bool) else value
        for item in fields(profile)
        if (value := getattr(profile, item.name))
    }
    make_private_folder(path.parent)
    text = StringIO()
    parser.write(text)
    with new_file(path) as file:
        file.write(text.getvalue().encode())


def load(environ: Mapping[str, str], overrides: Mapping[str, object]) -> Profile:
    """Return the profile with overrides from the command line and the environment.

    Args:
        environ: Environment.
        overrides: Fields by name; None and False keep the profile's value.

    Raises:
        ProfileError: The profile cannot be used.
    """
    profile = read_profile(profile_path(environ))
    token = environ.get(TOKEN_VARIABLE)
    if token:
        profile = replace(profile, token=token, refresh_token="")
    given = {name: value for name, value in overrides.items() if value}
    if "token_file" in given:
        profile = replace(profile, token="", refresh_token="")
    return replace(profile, **given)  # type: ignore[arg-type]  # argparse gives each its own type
