"""Opens a report in headless Chromium, checks it, and takes its pictures.

    python tools/look.py REPORT.html [--pictures FOLDER] [--chromium FILE]

It fails if the page requests anything from a network, writes an error to the console, leaves a chart undrawn, or shows
no tooltip under the pointer. It prints how long the page took to open. The pictures are report-light.png, of a desktop,
and report-dark-phone.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_DESKTOP, _PHONE = {"width": 1100, "height": 1250}, {"width": 390, "height": 844}


def chromium() -> str | None:
    """The path of this machine's Chromium."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Look:
    """One open page; ``problems`` collects the browser's complaints."""

    def __init__(self, browser: Browser, report: Path, scheme: str, size: dict[str, int], phone: bool = False) -> None:
        self.problems: list[str] = []
        context = browser.new_context(
            viewport=size, color_scheme=scheme, device_scale_factor=2 if phone else 1, is_mobile=phone, has_touch=phone
        )
        self.page: Page = context.new_page()
        self.page.on("console", lambda m: self._note("console", m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self._note("error", str(error)))
        self.page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:")) else self._note("request", r.url)
        )
        self.page.goto(report.absolute().as_uri(), wait_until="load")
        self.page.wait_for_selector(".chart svg")
        #: Milliseconds from the navigation until the page was loaded and until its first charts were drawn.
        self.loaded = self.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        self.drawn = self.page.evaluate("performance.now()")

    def _note(self, kind: str, text: str) -> None:
        self.problems.append(f"{kind}: {text}")

    def draw_all(self) -> None:
        """Scroll through the page, so that every chart is drawn."""
        for chart in self.page.query_selector_all(".chart"):
            chart.scroll_into_view_if_needed()
            chart.wait_for_selector("svg")

    def hover(self) -> str:
        """The text of the tooltip when the pointer is on a band of the first map."""
        band = self.page.locator(".chart svg .mark-rect path").nth(3)
        band.scroll_into_view_if_needed()
        band.hover()
        tooltip = self.page.locator("#vg-tooltip-element.visible")
        tooltip.wait_for(timeout=5000)
        return tooltip.inner_text()

    def widest(self) -> int:
        """The page's width in pixels; a page that is wider than the screen scrolls sideways."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


def main() -> int:
    """Check the report that the command line names; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--chromium", default=chromium())
    arguments = parser.parse_args()
    if arguments.chromium is None:
        print("wanted chromium on PATH, found none: apt-get install chromium, or name one with --chromium")
        return 1
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        desktop = Look(browser, arguments.report, "light", _DESKTOP)
        tooltip = desktop.hover()
        if arguments.pictures:
            desktop.page.screenshot(path=arguments.pictures / "report-light.png")
        desktop.draw_all()
        phone = Look(browser, arguments.report, "dark", _PHONE, phone=True)
        if arguments.pictures:
            phone.page.screenshot(path=arguments.pictures / "report-dark-phone.png")
        phone.draw_all()
        problems = desktop.problems + phone.problems
        if phone.widest() > _PHONE["width"]:
            problems.append(f"a phone scrolls sideways: {phone.widest()} pixels")
        charts = len(desktop.page.query_selector_all(".chart"))
        browser.close()
    summary = {
        "bytes": arguments.report.stat().st_size,
        "charts": charts,
        "loaded_ms": round(desktop.loaded),
        "first_charts_ms": round(desktop.drawn),
        "tooltip": tooltip,
        "problems": problems,
    }
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
