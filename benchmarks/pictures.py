"""The pictures of a report in the documentation, as Chromium shows it on a desk and on a phone.

    make demo
    python benchmarks/pictures.py demo/report.html

It writes `docs/report.png` and `docs/report-phone.png`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from common import DOCS

PICTURES = {
    "report": {"viewport": {"width": 1280, "height": 2360}, "device_scale_factor": 1},
    "report-phone": {"viewport": {"width": 390, "height": 1400}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a report.html")
    page = parser.parse_args().page.resolve()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("pictures need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, screen in PICTURES.items():
            tab = browser.new_context(color_scheme="light", **screen).new_page()
            tab.goto(page.as_uri())
            tab.wait_for_function("document.querySelectorAll('.plot').length === document.querySelectorAll('.plot .main-svg').length / 3")
            tab.screenshot(path=DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
