"""A page in a headless Chromium, without a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
LIMIT = 60_000  # milliseconds that a page may take to load


def find_chromium() -> str | None:
    """The path of a Chromium of this machine, None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browse(width: int, height: int = 900) -> Iterator[tuple[Page, list[str]]]:
    """A page of a width in pixels, and the list to which errors and requests beyond files and 127.0.0.1 are added."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(LIMIT)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        local = ("file:", "data:", "blob:", "http://127.0.0.1:")
        page.on("request", lambda asked: None if asked.url.startswith(local) else faults.append(asked.url))
        yield page, faults
        browser.close()


def ready(page: Page) -> None:
    """Wait until what can be explored is drawn."""
    page.wait_for_selector("#explore[aria-busy=false]")
