"""One Chromium for all tests of the dashboard: two of Playwright's loops do not run in one process."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.support.chromium import find, started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Yield a running Chromium."""
    program = find()
    if program is None:
        pytest.skip("no Chromium: `make tools`, or install chromium")
    with started(program, tmp_path_factory.mktemp("chromium")) as running:
        yield running
