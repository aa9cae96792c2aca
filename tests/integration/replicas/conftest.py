"""Where libfaketime is, under which coordinators have clocks of their own."""

from pathlib import Path
from typing import Final

import pytest

LIBRARY: Final = "libfaketimeMT.so.1"
ROOT: Final = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def faketime() -> str:
    """Return the path of libfaketime."""
    places = [ROOT / ".tools", *Path("/usr/lib").glob("*/faketime"), Path("/usr/lib64/faketime")]
    for place in places:
        if (place / LIBRARY).exists():
            return str(place / LIBRARY)
    pytest.skip("libfaketime is not installed: `make tools`")
