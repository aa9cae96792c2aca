"""A data scientist and an operator type their pages: in an empty folder, with nothing installed but the wheel."""

from pathlib import Path

import pytest

from tests.integration.docs.test_documentation import TYPED, runnable
from tests.packaging.test_wheel import dist, server, wheel
from tests.support.manual_pages import run_page

__all__ = ["dist", "server", "wheel"]  # fixtures

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", TYPED)
def test_the_page_runs_as_it_is_typed(page: str, server: Path, tmp_path: Path) -> None:
    run_page(runnable(page), tmp_path, "", server)
