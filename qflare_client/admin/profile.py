"""Where the coordinator is and who calls: an INI file that only its owner can read.

A token stands in the profile, or in a file that the profile names. The profile is looked for in QFLARE_PROFILE, then
in ~/.config/qflare/profile; a token in QFLARE_TOKEN outweighs both. Files that others can read are refused.
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
        message: What is wrong.
        remedy: What to do about it.
    """

    def __init__(self, message: str, *, remedy: str = "qflare-admin profile set") -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True)
class Profile:
    """How to reach a coordinator; empty fields are not set.

    `insecure` speaks plaintext to any address; loopback addresses are spoken to in plaintext without it, unless there
    is a CA file.
    """

    address: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    server_name: str = ""
    token: str = ""
    token_file: str = ""
    insecure: bool = False

    def secret(self) -> str:
        """Return the token.

        Raises:
            ProfileError: There is none, or its file is open to others.
        """
        if self.token:
            return self.token
        if not self.token_file:
            raise ProfileError(f"no token: run qflare-admin profile set, or set {TOKEN_VARIABLE}")
        return read_private(Path(self.token_file)).strip()


def profile_path(environ: Mapping[str, str]) -> Path:
    """Return where the profile is."""
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
    """Return the profile in a file; an empty one without a file.

    Raises:
        ProfileError: It is malformed, has an unknown name, or is open to others.
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
    """Write a profile that only its owner can read; a crash leaves the former one or this one.

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
    """Return the profile with what the command line and the environment say instead.

    Args:
        environ: Environment.
        overrides: Fields by name; None and False leave the profile's.

    Raises:
        ProfileError: The profile cannot be used.
    """
    profile = read_profile(profile_path(environ))
    token = environ.get(TOKEN_VARIABLE)
    if token:
        profile = replace(profile, token=token)
    given = {name: value for name, value in overrides.items() if value}
    if "token_file" in given:
        profile = replace(profile, token="")
    return replace(profile, **given)  # type: ignore[arg-type]  # argparse gives each its own type
