"""The pictures of the dashboard can be made again, and are small enough to be kept."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from docs.make_pictures import IMAGES, KEPT
from tests.support.chromium import ROOT, find

TIMEOUT_S: Final = 300
MAX_BYTES: Final = 150_000


@pytest.mark.slow
def test_the_pictures_can_be_made_again(tmp_path: Path) -> None:
    if find() is None:
        pytest.skip("no Chromium: `make tools`, or install chromium")

    # A process of its own: the remote control of a browser runs once in each.
    command = [sys.executable, "-m", "docs.make_pictures", "--all", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=TIMEOUT_S)

    made = {path.name for path in tmp_path.iterdir()}
    assert set(KEPT) < made


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_picture_is_small(name: str) -> None:
    assert 10_000 < (IMAGES / name).stat().st_size < MAX_BYTES
