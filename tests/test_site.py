"""The site that `make docs` builds, in a browser: from its files, without a network, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import DESKTOP, PHONE, console_errors, opened, too_wide, violations

SITE = Path(__file__).parent.parent / "site"
PAGES = ("index", "lab", "generated/layers")


@pytest.fixture(params=PAGES)
def page(request):
    path = SITE / f"{request.param}.html"
    if not path.is_file():
        pytest.skip("needs the site: make docs")
    return path


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_it_fits_and_everything_loads(page, width):
    with opened(page, width) as driver:
        assert console_errors(driver) == []
        assert too_wide(driver) == 0
        broken = driver.execute_script(
            "document.querySelectorAll('img').forEach((one) => { one.loading = 'eager'; });"
            "return [...document.images].filter((one) => one.complete && !one.naturalWidth).map((one) => one.src)"
        )
        assert broken == []


def test_no_reader_is_hindered(page):
    with opened(page, DESKTOP) as driver:
        assert violations(driver) == []
