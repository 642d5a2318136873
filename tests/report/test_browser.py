"""The report in a browser: from a file, without a network, on a desk and on a phone, in light and in dark."""

from __future__ import annotations

import pytest

from invflow.report.write import write_report
from invflow.training import run as runs
from tests.browser import DESKTOP, PHONE, console_errors, opened, too_wide, violations
from tests.test_density_training import points
from tests.test_training import tiny


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report on one run, and that on two."""
    folder = tmp_path_factory.mktemp("reports")
    one = runs.train(tiny(epochs=2), folder / "one", progress=False)
    other = runs.train(points(epochs=2), folder / "other", progress=False)
    return {"one run": write_report([one]), "two runs": write_report([one, other], folder / "two.html")}


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("kind", ["one run", "two runs"])
def test_it_fits_and_nothing_is_refused(pages, kind, width):
    with opened(pages[kind], width) as driver:
        assert driver.execute_script("return window.innerWidth") == width
        assert console_errors(driver) == []
        assert too_wide(driver) == 0
        small = driver.execute_script(
            "return [...document.querySelectorAll('body *')].filter((one) => one.innerText "
            "&& parseFloat(getComputedStyle(one).fontSize) < 12).map((one) => one.outerHTML.slice(0, 100))"
        )
        assert small == [], "text below 12 pixels"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["one run", "two runs"])
def test_readers_are_not_hindered(pages, kind, dark):
    with opened(pages[kind], PHONE, dark=dark) as driver:
        driver.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert violations(driver) == []


def test_the_slider_moves_by_keyboard_and_by_mouse(pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    with opened(pages["one run"], DESKTOP) as driver:
        slider, shown = driver.find_element(By.ID, "step"), driver.find_element(By.CSS_SELECTOR, ".now")

        def state():
            return slider.get_attribute("value"), slider.get_attribute("aria-valuetext"), shown.get_attribute("src")

        middle = state()
        assert middle[:2] == ("5", "step 6 of 11, t = 0.50")
        slider.send_keys(Keys.ARROW_RIGHT)
        assert state()[:2] == ("6", "step 7 of 11, t = 0.60")
        slider.send_keys(Keys.HOME)
        first = state()
        assert first[:2] == ("0", "step 1 of 11, t = 0.00")
        assert first[2] != middle[2]
        width = slider.size["width"]
        ActionChains(driver).move_to_element_with_offset(slider, width // 2 - 3, 0).click().perform()
        assert state()[:2] == ("10", "step 11 of 11, t = 1.00")
        frames = driver.find_element(By.CSS_SELECTOR, ".frames").find_elements(By.CSS_SELECTOR, ".frame")
        assert state()[2] == frames[10].get_attribute("src")


def test_all_steps_are_printed(pages):
    with opened(pages["one run"], DESKTOP) as driver:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        displayed = driver.execute_script(
            "return ['.slider', '.now', '.frame'].map((one) => getComputedStyle(document.querySelector(one)).display)"
        )
        assert displayed[:2] == ["none", "none"]
        assert displayed[2] != "none"
