"""Accessibility of the dashboard, by axe-core in a real Chromium: every page, three widths, both themes."""

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.integration.dashboard.test_browser import (
    WIDTHS,
    Screen,
    database_url,
    every_page,
    screen,
    train,
)

__all__ = ["Browser", "Deployment", "database_url", "screen"]


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_violation_on_any_page(screen: Screen, width: str, look: Any) -> None:
    session_id, _ = train(screen, 2)
    wide, high = WIDTHS[width]
    page = screen.open(
        Role.VIEWER,
        Role.AUDITOR,
        viewport={"width": wide, "height": high},
        color_scheme=look,
        reduced_motion="reduce",
    )
    found = {}

    for url in every_page(screen, session_id):
        page.goto(url)
        results = Axe().run(page)
        if results.violations_count:
            found[url] = results.generate_report()

    assert found == {}
