"""Takes the dashboard screenshots in `docs/images` from real training sessions.

    python -m docs.make_pictures
    python -m docs.make_pictures --all FOLDER    # full-length screenshots of every page

Eight devices train on handwritten digits. The screenshots are taken in round 15 of 24. Screenshots are stored with 256
colors, which keeps them small. The hero picture shows one page on a desktop and on a phone.
"""

import argparse
import shutil
import sys
import tempfile
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page

from qflare.v1 import training_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import initialize
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.chromium import ROOT, find, started
from tests.support.fleet import Fleet

IMAGES: Final = ROOT / "docs" / "images"
TYPES: Final = ["gateway", "gateway", "hospital", "hospital", "hospital", "phone", "phone", "phone"]
ROUNDS: Final = 24
PUBLISHED: Final = 14
PILOT: Final[dict[str, Any]] = {
    "device_training": training_pb2.DeviceTraining(local_epochs=1),
}
PRIVATE: Final[dict[str, Any]] = {
    "strategy": training_pb2.StrategyConfig(name="fedavg", uniform_weights=True),
    "privacy": training_pb2.PrivacyPolicy(
        noise_multiplier=1.0, clip_norm=1.0, epsilon_budget=24, delta=1e-5
    ),
}
SCREENS: Final = {
    "light": (1240, 860),
    "dark": (1240, 860),
    "tablet": (820, 1100),
    "phone": (360, 760),
}
COLORS: Final = 256
ABOVE: Final = "heading => window.scrollBy(0, heading.getBoundingClientRect().top - 26)"
HERO_SCALE: Final = 1.5
HERO: Final = """<!doctype html><style>
body {{ margin: 0; background: linear-gradient(120deg, #dfe8f5, #eef1f6 55%, #e3ecea); }}
img {{ position: absolute; display: block; box-shadow: 0 14px 44px rgb(23 32 43 / 24%); }}
.desk {{ left: 36px; top: 36px; width: 1040px; height: 940px; border-radius: 12px; }}
.phone {{ left: 1048px; top: 150px; width: 330px; border: 7px solid #0b0f14; border-radius: 34px; }}
</style><img class="desk" src="{desk}"><img class="phone" src="{phone}">"""


def main(folder: Path, target: Path, *, whole: bool) -> None:
    """Run the training session and write the screenshots into a folder."""
    program = find()
    if program is None:
        sys.exit("Chromium not found; run make tools")
    initialize(
        KeyFolder(folder / "data" / "keys", cost=Cost(iterations=1, memory_kib=1024, lanes=1)),
        "qflare",
        utc_now(),
    )
    config = ServerConfig(
        data_dir=folder / "data", listen="127.0.0.1:0", dashboard="127.0.0.1:0"
    ).checked()
    deployment = Deployment(config, folder)
    try:
        session_id = trained(deployment)
        with started(program, folder) as browser:
            take(browser, deployment, session_id, target, whole=whole)
    finally:
        deployment.close()


def trained(deployment: Deployment) -> str:
    """Complete a small training session and half of a larger one; return the id of the larger one."""
    fleet = Fleet(deployment, TYPES)
    everyone = len(TYPES)
    fleet.train(fleet.create("digits, pilot", 6, **PILOT), [6] * everyone)
    fleet.train(fleet.create("digits, private", 8, **PRIVATE), [8] * everyone)
    session_id = fleet.create("digits, all sites", ROUNDS)
    busy = 5
    fleet.train(session_id, [PUBLISHED + 1] * busy + [PUBLISHED] * (len(TYPES) - busy))
    extra = deployment.device("lost-phone", device_type="phone")
    devices = deployment.coordinator.use_cases.devices
    devices.suspend(Caller("admin:operator"), extra.device_id, "reported lost")
    return session_id


def take(
    browser: Browser, deployment: Deployment, session_id: str, target: Path, *, whole: bool
) -> None:
    """Take all screenshots."""
    assert deployment.coordinator.dashboard is not None
    url = deployment.coordinator.dashboard.url
    token = deployment.coordinator.use_cases.tokens.issue_admin(
        Caller(), "operator", [Role.VIEWER, Role.AUDITOR]
    ).secret
    hero(browser, url, token, session_id, target)
    pages = page_paths(deployment, session_id)
    for look, (width, height) in SCREENS.items():
        page = screen(browser, width, height, look)
        page.goto(url)
        if look == "light":
            shoot(page, target / "dashboard-login.png", whole=whole)
        log_in(page, token)
        for name, path in pages.items():
            page.goto(url + path)
            shoot(page, target / f"dashboard-{name}-{look}.png", whole=whole)
        page.context.close()


def page_paths(deployment: Deployment, session_id: str) -> dict[str, str]:
    """Return the path of each page by the name of its picture."""
    use_cases = deployment.coordinator.use_cases
    others = [row.id for row in use_cases.training.list(PageRequest()).rows]
    device_id = use_cases.devices.list_active()[0].id
    return {
        "overview": "",
        "session": f"sessions/{session_id}",
        "sessions": "sessions",
        "round": f"sessions/{session_id}/rounds/{PUBLISHED + 1}",
        "versions": f"sessions/{session_id}/versions",
        "version": f"sessions/{session_id}/versions/{PUBLISHED}",
        "compare": "compare?" + urlencode([("session", item) for item in others]),
        "private": f"sessions/{others[1]}",
        "devices": "devices",
        "device": f"device?id={device_id}",
        "audit": "audit",
        "system": "system",
    }


def screen(browser: Browser, width: int, height: int, look: str, scale: float = 1) -> Page:
    """Open a window of a size; `look` is one of `SCREENS`."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if look == "dark" else "light",
        device_scale_factor=2 if look == "phone" else scale,
    )
    return context.new_page()


def log_in(page: Page, token: str) -> None:
    """Log in on the page that asks for a token."""
    page.get_by_label("Admin token").fill(token)
    page.get_by_role("button", name="Log in").click()


def shoot(page: Page, path: Path, *, whole: bool) -> None:
    """Take one screenshot, of the viewport or of the whole page."""
    page.wait_for_load_state("networkidle")
    save(page.screenshot(full_page=whole), path)


def save(picture: bytes, path: Path) -> None:
    """Write a screenshot with few colors, without dithering."""
    path.parent.mkdir(exist_ok=True)
    with Image.open(BytesIO(picture)) as image:
        reduced = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def hero(browser: Browser, url: str, token: str, session_id: str, target: Path) -> None:
    """Take the picture for the README: the page of a training session on a desktop and on a phone."""
    shown = {}
    for name, size, look in (("desk", (1040, 940), "light"), ("phone", (330, 700), "dark")):
        page = screen(browser, *size, look, HERO_SCALE)
        page.goto(url)
        log_in(page, token)
        page.goto(f"{url}sessions/{session_id}")
        if name == "phone":
            page.locator("#lineage").evaluate(ABOVE)
        page.wait_for_load_state("networkidle")
        shown[name] = "data:image/png;base64," + b64encode(page.screenshot()).decode()
        page.context.close()
    page = screen(browser, 1428, 1012, "light", HERO_SCALE)
    page.set_content(HERO.format(**shown), wait_until="load")
    save(page.screenshot(), target / "dashboard-hero.png")
    page.context.close()


KEPT: Final = (
    "dashboard-hero.png",
    "dashboard-overview-light.png",
    "dashboard-session-light.png",
    "dashboard-version-light.png",
    "dashboard-overview-dark.png",
    "dashboard-overview-phone.png",
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    wanted = parser.parse_args().all
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "pictures"
        main(Path(scratch), made, whole=wanted is not None)
        if wanted is not None:
            shutil.copytree(made, wanted, dirs_exist_ok=True)
        else:
            for name in KEPT:
                shutil.copyfile(made / name, IMAGES / name)
