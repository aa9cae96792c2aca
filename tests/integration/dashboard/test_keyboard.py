"""Keyboard shortcuts of the dashboard in a real Chromium: each one does what the help says, and none while typing."""

import re
from typing import Final
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from qflare_server.serving.dashboard.app import SECTIONS
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.devices.administration import Profile
from tests.conftest import ROOT
from tests.integration.conftest import Deployment
from tests.integration.dashboard.test_browser import Screen, database_url, screen, train

__all__ = ["Browser", "Deployment", "database_url", "screen"]
PAGE_OF_DEVICES: Final = 50
OUTCOMES: Final = """() => {
  window.prevented = [];
  document.addEventListener("keydown", (event) => window.prevented.push(event.defaultPrevented));
}"""


@pytest.fixture
def page(screen: Screen) -> Page:
    return screen.open(Role.VIEWER, Role.AUDITOR, reduced_motion="reduce")


def path(page: Page) -> str:
    return urlsplit(page.url).path


def focused(page: Page) -> str:
    text: str = page.evaluate("document.activeElement.textContent")
    return text


def test_a_question_mark_opens_the_list_and_escape_returns_the_focus(page: Page) -> None:
    page.get_by_role("link", name="Devices", exact=True).focus()

    page.keyboard.press("?")

    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("button", name="Close")).to_be_focused()
    page.keyboard.press("g")
    page.keyboard.press("a")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("link", name="Devices", exact=True)).to_be_focused()


@pytest.mark.parametrize("look", ["light", "dark"])
def test_the_list_can_be_opened_with_a_button_and_is_accessible(screen: Screen, look: str) -> None:
    page = screen.open(Role.VIEWER, color_scheme=look, viewport={"width": 360, "height": 740})

    page.get_by_role("button", name="Keyboard shortcuts").click()

    expect(page.get_by_role("dialog")).to_be_visible()
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_the_manual_names_every_key_of_the_list(page: Page) -> None:
    manual = (ROOT / "docs" / "dashboard.md").read_text()
    section = manual.split("## Keyboard\n")[1].split("\n## ")[0]

    keys = {item.text_content() for item in page.locator("#keys-help kbd").all()}

    assert keys == set(re.findall(r"`([^`]+)`", section))


@pytest.mark.parametrize(("target", "name"), SECTIONS)
def test_g_and_a_letter_open_a_section(page: Page, target: str, name: str) -> None:
    page.goto(page.url + ("devices" if target == "/" else ""))

    page.keyboard.press("g")
    page.keyboard.press(name[0].lower())

    expect(page.locator(".top nav a[aria-current]")).to_have_text(name)
    page.wait_for_url(f"**{target}")


def test_j_and_k_move_between_entries_and_u_goes_up(screen: Screen, page: Page) -> None:
    session_id, _ = train(screen, 2)
    page.goto(f"{screen.url}sessions/{session_id}/versions")

    visited = []
    for key in "jjjjk":
        page.keyboard.press(key)
        visited.append(focused(page))
    page.keyboard.press("Enter")

    assert visited == ["Version 2", "Version 1", "Version 0", "Version 0", "Version 1"]
    expect(page.get_by_role("heading", level=1)).to_contain_text("Version 1")
    page.wait_for_load_state()  # the heading is there before the keys are
    page.keyboard.press("u")
    expect(page.get_by_role("heading", level=1)).to_have_text("Lineage")
    page.wait_for_load_state()
    page.keyboard.press("u")
    expect(page.get_by_role("heading", level=1)).to_contain_text("running")


def test_n_and_f_turn_the_pages_of_a_list(screen: Screen, page: Page) -> None:
    devices = screen.deployment.coordinator.use_cases.devices
    for number in range(PAGE_OF_DEVICES + 1):
        devices.add(Caller(), f"device-{number:03}", Profile())
    page.goto(screen.url + "devices")

    page.keyboard.press("n")
    expect(page.locator("tbody th a").get_by_text("device-050")).to_be_visible()
    page.wait_for_load_state()  # the rows are there before the keys are
    page.keyboard.press("f")

    expect(page.locator("tbody th a").get_by_text("device-000")).to_be_visible()


def test_l_and_z_switch_live_updates_and_time_zones(page: Page) -> None:
    page.keyboard.press("l")
    page.keyboard.press("z")

    expect(page.get_by_role("button", name="Live updates: on")).to_be_visible()
    expect(page.get_by_role("button", name="Times: UTC")).to_be_visible()


def test_keys_of_the_browser_and_of_a_field_are_left_alone(screen: Screen, page: Page) -> None:
    page.goto(screen.url + "audit")
    page.evaluate(OUTCOMES)

    for key in (
        "Control+j",
        "Alt+z",
        "Meta+l",
        "/",
        "'",
        "Space",
        "Tab",
        "Home",
        "End",
        "PageDown",
    ):
        page.keyboard.press(key)
    field = page.get_by_label("Actor")
    field.focus()
    page.keyboard.type("?gjlz")

    assert True not in page.evaluate("window.prevented")
    expect(field).to_have_value("?gjlz")
    expect(page.get_by_role("button", name="Live updates: off")).to_be_visible()


def test_shortcuts_can_be_turned_off_for_good(page: Page) -> None:
    page.keyboard.press("?")
    page.get_by_label("Use these keys in this browser").uncheck()
    page.keyboard.press("Escape")
    page.reload()

    page.keyboard.press("?")
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.keyboard.press("l")

    expect(page.get_by_role("button", name="Live updates: off")).to_be_visible()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert path(page) == "/"


def test_a_viewer_has_no_key_for_a_section_that_is_not_shown(screen: Screen) -> None:
    page = screen.open(Role.VIEWER, reduced_motion="reduce")

    page.keyboard.press("g")
    page.keyboard.press("a")
    page.keyboard.press("?")

    expect(page.get_by_role("dialog")).not_to_contain_text("Audit")
    assert path(page) == "/"
