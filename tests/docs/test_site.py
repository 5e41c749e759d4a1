"""`make docs`: the site builds without warnings, and reading it needs no network."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[2]
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class Loads(HTMLParser):
    """What a page loads, and the identifiers and links in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in LOADING and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given.get(LOADING[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    code, said = processes.run(command, cwd=ROOT, env=processes.quiet({"NO_MKDOCS_2_WARNING": "1"}))
    assert code == 0, said
    return folder


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.loaded, page
        for address in parser.loaded:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", sheet.read_text(encoding="utf-8"))
        assert not [a for a in addresses if re.match(r"(https?:)?//", a)], sheet


@pytest.mark.slow
def test_the_pages_hold_what_they_should(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "Never measured" in front  # README.md
    assert 'src="images/search.png"' in front
    assert 'href="quickstart.html"' in front
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in ("tvl_align.inference.registers.load", "tvl_align.contract.Output", "tvl_align.features.store.FeatureStore"):
        assert f'id="{name}"' in api
    assert "<!-- after" not in (site / "use.html").read_text(encoding="utf-8")  # notes to tests
    assert not (site / "front_page.py").exists()
    assert (site / "explore.ipynb").is_file()
