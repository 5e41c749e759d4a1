"""A Chromium for the tests of a file; they are skipped where there is none."""

from collections.abc import Iterator

import pytest
from chromium import NAMES, chromium, find_chromium
from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip(f"there is no {', '.join(NAMES)} on this machine")
    with chromium() as made:
        yield made
