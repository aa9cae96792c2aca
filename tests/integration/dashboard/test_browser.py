"""The dashboard in a real Chromium: what a person sees, at which width, with which keys, and what the browser says.

Every page that a test opens is watched: a request to elsewhere, a violation of the policy, an error on the console or
an error of the script fails the test.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from qflare_client import Client
from qflare_server.serving.dashboard.app import PAGES
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from qflare_server.use_cases.devices.administration import Profile
from tests.integration.conftest import Deployment

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">" * 2
)
expect.set_options(timeout=15_000)  # three refreshes
WIDTHS = {"phone": (360, 740), "tablet": (820, 1100), "desk": (1280, 900)}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough for what a browser shows; the pages over HTTP run on both."""
    return sqlite_url


@dataclass
class Screen:
    """A window of the browser on a deployment, and what the browser complained of."""

    deployment: Deployment
    browser: Browser
    complaints: list[str] = field(default_factory=list)
    contexts: list[BrowserContext] = field(default_factory=list)

    @property
    def url(self) -> str:
        assert self.deployment.coordinator.dashboard is not None
        return self.deployment.coordinator.dashboard.url

    def open(self, *roles: Role, **settings: Any) -> Page:
        """Open a window; logged in, if there are roles."""
        context = self.browser.new_context(**settings)
        context.set_default_timeout(20_000)
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda item: self._heard(item.type, item.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._requested(request.url))
        page.goto(self.url)
        if roles:
            log_in(page, self.deployment.issue_admin(*roles))
            expect(page.get_by_role("heading", name="Overview", level=1)).to_be_visible()
            page.wait_for_load_state()  # the heading is there before the script is
        return page

    def _heard(self, kind: str, text: str) -> None:
        if kind in {"error", "warning"}:
            self.complaints.append(text)

    def _requested(self, url: str) -> None:
        if urlsplit(url).netloc != urlsplit(self.url).netloc:
            self.complaints.append(f"asked for {url}")


@pytest.fixture
def screen(deploy: Callable[..., Deployment], browser: Browser) -> Iterator[Screen]:
    """Yield a browser on a deployment with a dashboard; fails the test on any complaint."""
    made = Screen(deploy(dashboard="127.0.0.1:0"), browser)
    yield made
    for context in made.contexts:
        context.close()
    assert made.complaints == []


def log_in(page: Page, token: str) -> None:
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Log in").click()


def contribute(client: Client, session_id: str, step: float) -> None:
    """Send one update."""
    task = client.get_task(session_id)
    base = client.download_base(task)
    arrays = {name: values + np.float32(step) for name, values in base.arrays.items()}
    client.submit(
        task, base, arrays, 10, {"accuracy": min(0.95, 0.3 + step / 10), "loss": 1 / step}
    )


def train(screen: Screen, round_count: int) -> tuple[str, Client]:
    """Run the first rounds of a training session of twenty with one device."""
    client = screen.deployment.device("one", device_type="phone")
    session_id = screen.deployment.session(total_rounds=20, rounds={"quorum": 1, "target": 1})
    for number in range(1, round_count + 1):
        while client.get_task(session_id).round_number != number:
            pass
        contribute(client, session_id, float(number))
    while client.get_task(session_id).round_number <= round_count:
        pass
    return session_id, client


def every_page(screen: Screen, session_id: str) -> list[str]:
    device_id = screen.deployment.coordinator.use_cases.devices.list_active()[0].id
    values = {"session_id": session_id, "number": "1"}
    found = [page.path.format(**values) for page in PAGES if page.path != "/device"]
    return [screen.url.rstrip("/") + path for path in [*found, f"/device?id={device_id}"]]


def test_a_person_logs_in_and_out(screen: Screen) -> None:
    page = screen.open(Role.VIEWER)
    assert page.evaluate("document.cookie") == ""

    page.get_by_role("button", name="Log out").click()

    expect(page.get_by_label("Admin token")).to_be_focused()
    page.goto(screen.url)
    assert urlsplit(page.url).path == "/login"


def test_a_wrong_token_is_said(screen: Screen) -> None:
    page = screen.open()

    log_in(page, "qfm1.wrong")

    expect(page.get_by_role("alert")).to_have_text("This token does not open the dashboard.")
    assert "wrong" not in page.url
    # The browser itself reports the status of the answer.
    (complaint,) = screen.complaints
    assert "401" in complaint
    screen.complaints.clear()


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_fits_and_the_browser_has_no_complaint(
    screen: Screen, width: str, look: Any
) -> None:
    session_id, _ = train(screen, 2)
    wide, high = WIDTHS[width]
    page = screen.open(
        Role.VIEWER,
        Role.AUDITOR,
        viewport={"width": wide, "height": high},
        color_scheme=look,
        reduced_motion="reduce",
    )

    for url in every_page(screen, session_id):
        page.goto(url)

        assert page.evaluate("document.documentElement.scrollWidth") <= wide, url
        shades = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, shades[4:-1].split(","))) < 200) == (look == "dark")
        assert page.get_by_role("heading", level=1).count() == 1
        assert page.locator("[style], script:not([src]), style").count() == 0


def test_hostile_names_stay_text_and_fit_a_phone(screen: Screen) -> None:
    devices = screen.deployment.coordinator.use_cases.devices
    devices.add(Caller(name="admin:" + HOSTILE), HOSTILE, Profile(device_type=HOSTILE[:100]))
    devices.suspend(Caller(), HOSTILE, f"reported lost {HOSTILE}")
    page = screen.open(
        Role.VIEWER, Role.AUDITOR, viewport={"width": 360, "height": 740}, reduced_motion="reduce"
    )

    for path in ("devices", "audit"):
        page.goto(screen.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert "taken" not in page.title()
        assert page.locator("main img, main script").count() == 0
    page.goto(screen.url + "devices")
    page.locator("tbody tr", has_text="reported lost").locator("th a").click()

    expect(page.get_by_role("heading", level=1)).to_contain_text("<script>document.title=")


def test_the_keyboard_reaches_everything(screen: Screen) -> None:
    session_id, _ = train(screen, 2)
    page = screen.open(Role.VIEWER, Role.AUDITOR, reduced_motion="reduce")
    page.goto(f"{screen.url}sessions/{session_id}")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    assert page.get_by_role("link", name="Skip to content").bounding_box()["y"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Training sessions")).to_be_focused()

    wanted = page.locator("a, button:visible, summary, [tabindex='0']:visible").count()
    reached = set()
    page.goto(f"{screen.url}sessions/{session_id}")
    for _ in range(2 * wanted):
        page.keyboard.press("Tab")
        reached.add(tuple(page.evaluate(_FOCUSED)))
    assert len({place for place, _ in reached if place >= 0}) == wanted
    assert all(width >= 2 for place, width in reached if place >= 0)


_FOCUSED = """() => {
  const places = [...document.querySelectorAll("a, button, summary, [tabindex='0']")];
  const place = places.indexOf(document.activeElement);
  return [place, place < 0 ? 0 : parseFloat(getComputedStyle(document.activeElement).outlineWidth)];
}"""


def test_a_table_stands_behind_every_chart(screen: Screen) -> None:
    session_id, _ = train(screen, 3)
    page = screen.open(Role.VIEWER, reduced_motion="reduce")
    page.goto(f"{screen.url}sessions/{session_id}")

    charts = page.locator("figure.chart")
    assert charts.count() == 4
    for index in range(4):
        chart = charts.nth(index)
        drawing = chart.get_by_role("img")
        assert drawing.count() == 1
        expect(drawing).to_have_accessible_name(_NAMES[index])
        chart.locator("summary").press("Enter")
        expect(chart.get_by_role("row")).to_have_count(5 if index == 3 else 4)


_NAMES: list[str | re.Pattern[str]] = [
    re.compile(
        "^Accuracy by version While training: from 40.0 % at version 1 to 60.0 % at version 3;"
    ),
    "Loss by version While training: from 1 at version 1 to 0.3333 at version 3; lowest 0.3333, highest 1.",
    re.compile("Time of each phase, by round, logarithmic The latest 3 rounds took from .* each."),
    "Devices, by round From 0 to 1 devices took part in each of the latest 4 rounds.",
]


def test_a_running_training_session_shows_itself(screen: Screen) -> None:
    session_id, client = train(screen, 1)
    page = screen.open(Role.VIEWER)
    expect(page.get_by_text("Round 2 is collecting updates")).to_be_visible()

    contribute(client, session_id, 5.0)

    expect(page.get_by_text("Round 3 is collecting updates")).to_be_visible()
    expect(page.locator(".card")).to_contain_text("80.0 %")


def test_live_updates_can_be_stopped(screen: Screen) -> None:
    page = screen.open(Role.VIEWER)
    button = page.get_by_role("button", name="Live updates")
    expect(button).to_have_attribute("aria-pressed", "true")

    button.click()

    expect(button).to_have_attribute("aria-pressed", "false")
    expect(button).to_have_text("Live updates: off")


def test_who_wants_no_motion_gets_no_updates_unasked(screen: Screen) -> None:
    page = screen.open(Role.VIEWER, reduced_motion="reduce")

    expect(page.get_by_role("button", name="Live updates: off")).to_be_visible()


def test_a_refresh_leaves_open_what_is_open_and_the_focus_where_it_is(screen: Screen) -> None:
    session_id, client = train(screen, 1)
    page = screen.open(Role.VIEWER)
    page.goto(f"{screen.url}sessions/{session_id}")
    summary = page.locator("#accuracy-table summary")
    summary.press("Enter")

    contribute(client, session_id, 2.0)

    expect(page.locator("#accuracy-table tbody tr")).to_have_count(2)
    expect(page.locator("#accuracy-table")).to_have_attribute("open", "")
    expect(summary).to_be_focused()


def test_times_are_local_with_utc_beside_them_and_the_choice_stays(screen: Screen) -> None:
    session_id, _ = train(screen, 1)
    page = screen.open(Role.VIEWER, timezone_id="America/New_York", reduced_motion="reduce")
    page.goto(f"{screen.url}sessions/{session_id}")
    created = page.locator("dt", has_text="Created").locator("..").locator("time")
    expect(created).to_have_text(re.compile(r"E[SD]T$"))
    expect(created).to_have_attribute("title", re.compile("UTC$"))

    page.get_by_role("button", name="Times: local").press("Enter")
    page.reload()

    expect(created).to_have_text(re.compile("UTC$"))
    expect(created).to_have_attribute("title", re.compile(r"E[SD]T$"))


def test_without_scripts_it_works_as_well(screen: Screen) -> None:
    page = screen.open(Role.VIEWER, java_script_enabled=False)

    page.get_by_role("link", name="Devices", exact=True).click()

    expect(page.get_by_role("heading", name="Devices", level=1)).to_be_visible()
    assert page.locator("#live:visible").count() == 0
