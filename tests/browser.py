"""Pages in a browser without a window: what it complains of, and what hinders readers."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEIGHT = 900
PHONE = 390
DESKTOP = 1280
AXE = "INVFLOW_AXE"
"""The environment variable that names the file ``axe.min.js`` of axe-core."""
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def opened(page: Path, width: int, *, dark: bool = False) -> Iterator[Any]:
    """A driver of Chromium that shows a page from its file, without a network; skipped if it is not installed.

    Args:
        page: the file.
        width: of the window, in CSS pixels.
        dark: whether the reader prefers dark colours.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("needs Chromium and its driver: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < DESKTOP}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        driver.get(page.resolve().as_uri())
        yield driver
    finally:
        driver.quit()


def console_errors(driver: Any) -> list[str]:
    """What the console holds: errors of scripts, addresses that were refused, and warnings."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def too_wide(driver: Any) -> int:
    """By how many pixels the page is wider than its window; 0 if it does not scroll sideways."""
    script = "return Math.max(0, document.documentElement.scrollWidth - window.innerWidth)"
    return int(driver.execute_script(script))


def violations(driver: Any) -> list[str]:
    """The serious and critical violations that axe-core finds, WCAG 2.2 AA and its contrast included, a line each.

    Skipped, with the reason, if the environment does not say where axe-core is.
    """
    path = os.environ.get(AXE)
    if path is None:
        pytest.skip(f"needs axe-core: set {AXE} to its file axe.min.js")
    driver.execute_script(Path(path).read_text(encoding="utf-8"))
    found = driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    return [
        f"{one['impact']}: {one['id']}: {one['help']}: {node['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]


def screenshot(driver: Any, path: Path) -> None:
    """Write a picture of the whole page."""
    import base64

    options = {"captureBeyondViewport": True, "format": "png"}
    path.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))
