"""Device groups: validation of names. A training session that names groups is restricted to their devices."""

import re
from collections.abc import Collection
from typing import Final

from qflare_server.errors import InvalidRequestError

MAX_GROUPS: Final = 32
"""Groups of one device, token or training session."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def checked_groups(names: Collection[str], field: str) -> list[str]:
    """Return group names in alphabetical order, each once.

    Raises:
        InvalidRequestError: There are too many, or a name is malformed.
    """
    groups = sorted(set(names))
    if len(groups) > MAX_GROUPS:
        raise InvalidRequestError(
            f"{field}: got {len(groups)} groups, want at most {MAX_GROUPS}", field=field
        )
    for name in groups:
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{field}: want names of 1 to 63 characters of a-z 0-9 . _ -, "
                "the first one a letter or digit",
                field=field,
            )
    return groups
