"""Takes the dashboard screenshots in `docs/images` from a real training session.

    python -m docs.make_pictures
    python -m docs.make_pictures --all FOLDER    # full-length screenshots of every page

Eight devices train on handwritten digits. The screenshots are taken in round 15 of 24.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser, Page

from qflare_server.config import ServerConfig
from qflare_server.context import utc_now
from qflare_server.keys.folder import KeyFolder
from qflare_server.keys.secret_files import Cost
from qflare_server.keys.setup import initialize
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role
from tests.integration.conftest import Deployment
from tests.support.chromium import ROOT, find, started
from tests.support.fleet import Fleet

IMAGES: Final = ROOT / "docs" / "images"
TYPES: Final = ["gateway", "gateway", "hospital", "hospital", "hospital", "phone", "phone", "phone"]
ROUNDS: Final = 24
PUBLISHED: Final = 14
DESK: Final = (1240, 860)
PHONE: Final = (360, 760)


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
    fleet.train(fleet.create("digits, pilot", 6), [6] * len(TYPES))
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
    pages = {
        "overview": "",
        "session": f"sessions/{session_id}",
        "sessions": "sessions",
        "round": f"sessions/{session_id}/rounds/{PUBLISHED + 1}",
        "devices": "devices",
        "audit": "audit",
        "system": "system",
    }
    for look, width, height in (("light", *DESK), ("dark", *DESK), ("phone", *PHONE)):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if look == "dark" else "light",
            device_scale_factor=2 if look == "phone" else 1,
        )
        page = context.new_page()
        page.goto(url)
        if look == "light":
            shoot(page, target / "dashboard-login.png", whole=whole)
        page.get_by_label("Admin token").fill(token)
        page.get_by_role("button", name="Log in").click()
        for name, path in pages.items():
            page.goto(url + path)
            shoot(page, target / f"dashboard-{name}-{look}.png", whole=whole)
        context.close()


def shoot(page: Page, path: Path, *, whole: bool) -> None:
    """Take one screenshot, of the viewport or of the whole page."""
    page.wait_for_load_state("networkidle")
    page.screenshot(path=path, full_page=whole)


KEPT: Final = (
    "dashboard-overview-light.png",
    "dashboard-session-light.png",
    "dashboard-overview-dark.png",
    "dashboard-session-dark.png",
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
