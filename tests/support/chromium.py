"""The real Chromium that tests of the dashboard and its pictures drive: found, started without a window, closed.

It is what `make tools` unpacked below `.tools`, or a Chromium on the PATH. Playwright is its remote control.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser, sync_playwright

ROOT: Final = Path(__file__).parents[2]
UNPACKED: Final = ROOT / ".tools" / "chromium"
NAMES: Final = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FONTS: Final = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><include ignore_missing="yes">/etc/fonts/fonts.conf</include><dir>{fonts}</dir></fontconfig>
"""


def find() -> Path | None:
    """Return the browser's program, None where there is none."""
    unpacked = UNPACKED / "usr" / "lib" / "chromium" / "chromium-headless-shell"
    if unpacked.is_file():
        return unpacked
    found = filter(None, map(shutil.which, NAMES))
    return next(map(Path, found), None)


def _environment(program: Path, folder: Path) -> dict[str, str | float | bool]:
    """Return the environment of the browser, with the libraries and fonts that were unpacked with it."""
    environ: dict[str, str | float | bool] = dict(os.environ)
    if not program.is_relative_to(UNPACKED):
        return environ
    libraries = [
        path
        for place in UNPACKED.glob("usr/lib/*-linux-gnu")
        for path in (place, place / "pulseaudio")
    ]
    fonts = folder / "fonts.conf"
    fonts.write_text(FONTS.format(fonts=UNPACKED / "usr" / "share" / "fonts"))
    environ["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
    environ["FONTCONFIG_FILE"] = str(fonts)
    return environ


@contextmanager
def started(program: Path, folder: Path) -> Iterator[Browser]:
    """Run the browser.

    Args:
        program: From `find`.
        folder: For its files.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, env=_environment(program, folder), timeout=60_000
        )
        try:
            yield browser
        finally:
            browser.close()
