"""The explorable page in a headless Chromium: what a click, the slider and a key change."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import drawn, opened
from made_results import LEVELS, colour_of, made_exploration, write_explored_run
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from tvl_align.report.page import parts_of, render_page, write_page
from tvl_align.report.server import PageServer

FOUND = made_exploration()
NAMES = FOUND.modalities.tolist()
PAIRS = [tuple(pair) for pair in FOUND.directions.tolist()]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(write_explored_run(tmp_path_factory.mktemp("explored") / "run")).as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address, 1400) as made:
        yield made


def rows_of(items: Locator) -> list[int]:
    return items.evaluate_all("items => items.map((item) => Number(item.dataset.row))")


def finds(page: Page, query: str, gallery: str, right: bool = False) -> list[int]:
    """The rows that are shown as finds of a direction, nearest first; right: those with a frame and a mark only."""
    direction = PAIRS.index((NAMES.index(query), NAMES.index(gallery)))
    framed = page.locator(f'#finds [data-direction="{direction}"] .item{".right:has(.mark)" if right else ""}')
    return rows_of(framed)


def check_finds(page: Page, query: str, row: int, k: int) -> None:
    """The page shows what explore.npz says, and frames what is right."""
    for gallery in NAMES:
        if gallery != query:
            d = PAIRS.index((NAMES.index(query), NAMES.index(gallery)))
            expected = FOUND.finds[k, d, row]
            assert finds(page, query, gallery) == expected[expected >= 0].tolist()
            assert finds(page, query, gallery, right=True) == expected[FOUND.right[k, d, row]].tolist()


def click(page: Page, target: str | Locator) -> None:
    (page.locator(target) if isinstance(target, str) else target).click()
    drawn(page)


def test_a_row_shows_what_it_finds(page: Page) -> None:
    check_finds(page, "tactile", 0, 1)
    first = page.locator("#finds .items").first.locator(".item").first
    score = FOUND.scores[1, PAIRS.index((1, 0)), 0, 0]
    assert f"similarity {float(score):.2f}" in str(first.get_attribute("aria-label"))
    d, rank = PAIRS.index((1, 0)), FOUND.rank[1]
    assert f"rank {rank[d, 0] + 1} · right ones: 1" in page.locator(f'#finds [data-direction="{d}"]').inner_text()
    hits = 100 * np.mean(rank[d][rank[d] >= 0] == 0)
    assert f"Over all 11 queries, with 2 of 2 registers: Acc@1 {hits:.1f}%" in page.locator("#finds").inner_text()
    assert page.locator("#factors").inner_text().split() == ["hue", LEVELS[0]]  # row 0 has no size


@pytest.mark.parametrize("gallery", ["vision", "text"])
def test_a_click_on_a_find_makes_it_the_query(page: Page, gallery: str) -> None:
    d = PAIRS.index((1, NAMES.index(gallery)))
    row = int(FOUND.finds[1, d, 0, 2])
    click(page, page.locator(f'#finds [data-direction="{d}"] .item').nth(2))
    assert page.locator("#item-title").inner_text() == f"Row {row}"
    assert rows_of(page.locator("#item .query")) == [row]
    assert page.locator("#query input:checked").get_attribute("value") == str(NAMES.index(gallery))
    check_finds(page, gallery, row, 1)


def test_the_slider_changes_the_finds(page: Page) -> None:
    page.locator("#kept").focus()
    page.keyboard.press("ArrowLeft")
    drawn(page)
    assert page.locator("#kept-value").inner_text() == "1 of 2"
    check_finds(page, "tactile", 0, 0)
    assert not np.array_equal(FOUND.finds[0, :, 0], FOUND.finds[1, :, 0])
    assert page.locator(".tile.dropped").count() == len(NAMES)  # the second register of each modality
    assert page.url.endswith("#row=0&query=tactile&kept=1")


def test_an_address_opens_a_row(browser: Browser, address: str) -> None:
    with opened(browser, f"{address}#row=7&query=text&kept=1", 1400) as page:
        check_finds(page, "text", 7, 0)
    with opened(browser, f"{address}#row=99&query=smell&kept=x", 1400) as page:
        check_finds(page, "tactile", 0, 1)


def test_a_row_that_lacks_the_modality_is_searched_with_another(browser: Browser, address: str) -> None:
    with opened(browser, address, 1400) as page:
        page.locator("#row").fill("1")
        page.locator("#row").press("Enter")
        drawn(page)
        assert page.locator("#query input:checked").get_attribute("value") == "0"
        assert page.locator("#query input").nth(1).is_disabled()
        assert "this row has none of both" in page.locator("#finds").inner_text()
        check_finds(page, "vision", 1, 1)


def test_keys_step_through_rows_and_keep_the_focus(page: Page) -> None:
    page.keyboard.press("ArrowRight")
    drawn(page)
    assert page.locator("#item-title").inner_text() == "Row 2"  # row 1 has no touch image
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    drawn(page)
    assert page.locator("#item-title").inner_text() == "Row 11"
    chosen = page.locator("#strip .item").nth(3)
    chosen.focus()
    page.keyboard.press("Enter")
    drawn(page)
    assert page.locator("#item-title").inner_text() == "Row 4"
    assert page.evaluate("document.activeElement.dataset.key") == "strip 1 4"


def test_pictures_are_those_of_their_rows(page: Page) -> None:
    """The middle of a picture on the screen has the colour of its file."""
    for place, modality in (("#item", "vision"), ("#item", "tactile"), ("#strip", "tactile"), ("#finds", "vision")):
        one = NAMES.index(modality)
        shown = page.locator(f'{place} [data-key*=" {one} "]').last
        row = int(str(shown.get_attribute("data-row")))
        image = Image.open(io.BytesIO(shown.locator(".picture").screenshot())).convert("RGB")
        assert image.getpixel((image.width // 2, image.height // 2)) == pytest.approx(colour_of(modality, row), abs=12), (
            place
        )


def test_rows_whose_first_find_is_wrong_can_be_chosen(page: Page) -> None:
    d = PAIRS.index((1, 0))
    for kind, wanted in (("wrong", FOUND.rank[1, d] > 0), ("right", FOUND.rank[1, d] == 0)):
        page.locator("#filter").select_option(f"{kind} {d}")
        drawn(page)
        assert rows_of(page.locator("#strip .item")) == np.flatnonzero(wanted).tolist()


def test_confusions_are_counted_and_lead_to_their_rows(page: Page) -> None:
    d, hue = PAIRS.index((1, 0)), FOUND.labels["hue"]
    valid = np.flatnonzero(FOUND.rank[1, d] >= 0)
    counts = np.zeros((3, 3), int)
    for row in valid:
        counts[hue[row], hue[FOUND.finds[1, d, row, 0]]] += 1
    assert page.locator("#classes-factor option").all_inner_texts() == ["hue (shared)", "size"]  # of size no owner is known
    shown = page.locator("#classes td").all_inner_texts()
    expected = [f"{round(100 * float(n) / counts[i].sum() + 1e-9)}" for i in range(3) for n in counts[i]]
    assert shown == expected
    own, other = np.argwhere(counts)[0]
    click(page, page.locator("#classes td").nth(3 * own + other).locator("button"))
    rows = [r for r in valid if hue[r] == own and hue[FOUND.finds[1, d, r, 0]] == other]
    assert rows_of(page.locator("#strip .item")) == rows
    assert page.locator("#item-title").inner_text() == f"Row {rows[0]}"


def test_a_click_on_a_point_of_the_map_shows_its_row(page: Page) -> None:
    page.locator("#map-up").select_option(index=1)
    page.locator("#map-across").select_option(index=0)
    drawn(page)
    at = FOUND.maps["pooled.tactile"].astype(float)[:, :2]
    low, high = np.nanmin(at, 0), np.nanmax(at, 0)
    box = page.locator("#map").evaluate("map => [map.clientWidth, map.clientHeight]")
    x, y = (at[5] - low) / (high - low)
    page.locator("#map").click(position={"x": 28 + x * (box[0] - 42), "y": box[1] - 28 - y * (box[1] - 42)})
    drawn(page)
    assert page.locator("#item-title").inner_text() == "Row 5"
    assert "Map of 11 rows by pooled, for retrieval tokens of touch images; row 5" in str(
        page.locator("#map").get_attribute("aria-label")
    )


def test_a_level_of_the_legend_is_shown_alone(page: Page) -> None:
    def points() -> int:
        """Pixels of the map that are not faint."""
        pixels = 'map.getContext("2d").getImageData(0, 0, map.width, map.height).data'
        return page.locator("#map").evaluate(f"map => {pixels}.filter((v, i) => i % 4 === 3 && v > 180).length")

    before = points()
    click(page, page.locator("#legend button").nth(1))
    assert page.locator("#legend button").nth(1).get_attribute("aria-pressed") == "true"
    assert points() < before
    page.locator("#map-factor").select_option(index=2)
    drawn(page)
    assert page.locator("#legend button").all_inner_texts() == [f"quantile {i}" for i in range(1, 6)]


def test_where_registers_look(page: Page) -> None:
    tiles = page.locator("#maps .tile")
    assert tiles.count() == 3 * len(NAMES)
    shares = FOUND.attention["tactile"][0, 1].astype(float)  # register 2 of the touch image of row 0
    opacity = tiles.nth(3 + 1).locator(".shade i").evaluate_all("cells => cells.map((cell) => Number(cell.style.opacity))")
    assert opacity == pytest.approx(0.85 * (1 - shares[1:] / shares[1:].max()), abs=0.02)
    said = tiles.nth(3 + 1).inner_text()
    assert "2 overlapping" in said and f"patch {100 * shares[1:].max():.0f}%, whole {100 * shares[0]:.0f}%" in said
    assert tiles.nth(2 * 3).locator(".bars i").count() == 17  # tokens of the sentence


def test_rows_whose_attention_was_not_measured_lead_to_one_that_was(browser: Browser, tmp_path: Path) -> None:
    run = write_explored_run(tmp_path / "run", look_step=5)
    with opened(browser, f"{write_page(run).as_uri()}#row=8", 1400) as page:
        assert page.locator("#maps .tile").count() == 0
        assert "Measured for one row in 5 only" in page.locator("#maps").inner_text()
        click(page, page.locator("#maps button"))
        assert page.locator("#item-title").inner_text() == "Row 5"
        assert page.locator("#maps .tile").count() == 9


def test_features_of_ones_own_have_names_instead_of_pictures(browser: Browser, tmp_path: Path) -> None:
    run = write_explored_run(tmp_path / "run", modalities=("force", "sound", "smell"), files=False)
    with opened(browser, write_page(run).as_uri(), 1400) as page:
        assert page.locator(".picture").count() == 0
        assert page.locator("#query").inner_text().split() == ["Search", "with", "force", "sound", "smell"]
        row = int(FOUND.finds[1, 0, 0, 0])
        assert f"row {row}: row-{row}" in page.locator('#finds [data-direction="0"] .item').first.inner_text()
        click(page, page.locator('#finds [data-direction="0"] .item').first)
        assert page.locator("#query input:checked").get_attribute("value") == "1"


def test_a_served_page_is_the_same_page(browser: Browser, tmp_path: Path) -> None:
    run = write_explored_run(tmp_path / "run")
    parts = parts_of(run, FOUND, 1, 32)
    with PageServer(render_page(run, FOUND, parts, embed=False), parts, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with opened(browser, f"{server.address}#row=3", 1400) as page:
                check_finds(page, "tactile", 3, 1)
                test_pictures_are_those_of_their_rows(page)
                page.locator("#next").click()
                drawn(page)
                check_finds(page, "tactile", 4, 1)
        finally:
            server.shutdown()
            thread.join()
