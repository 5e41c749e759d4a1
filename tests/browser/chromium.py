"""Pages in a headless Chromium, without a network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
LIMIT = 60_000  # milliseconds that a page may take to load
LOCAL = ("file:", "data:", "blob:", "http://127.0.0.1:")
WIDTHS = (1400, 390)  # pixels, of a desktop and of a phone


def find_chromium() -> str | None:
    """The path of a Chromium of this machine, None without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, width: int, height: int = 900) -> Iterator[Page]:
    """A page in a window of a size in pixels, once it is drawn. An error in the page, and a request to anything but this
    machine, is an AssertionError at the end."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(LIMIT)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(LOCAL) else faults.append(asked.url))
    page.goto(address)
    drawn(page)
    yield page
    page.close()
    assert not faults, faults


def drawn(page: Page) -> None:
    """Wait until what can be explored is drawn; a page without it is."""
    page.wait_for_selector("body:not(:has(#explore[aria-busy=true]))")
