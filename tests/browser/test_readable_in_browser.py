"""The pages can be read: on a phone, by keyboard and screen reader, by contrast, and no text lies over another."""

from collections.abc import Iterator

import pytest
from chromium import WIDTHS, opened
from made_results import factor, made_results, write_explored_run, write_run
from playwright.sync_api import Browser, Page

from tvl_align.report.compare import write_comparison
from tvl_align.report.page import write_page

KINDS = ("run", "own", "comparison")
LONG = "a method with a name of many words --and_options 32 --that_differ 0.125"

TEXTS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let count = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, style, option, select") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    count++;
    range.selectNodeContents(node);
    let clip = null;
    for (let at = parent; at; at = at.parentElement) {
      if (getComputedStyle(at).overflowX === "auto") clip = at.getBoundingClientRect();
    }
    for (const { left: from, right: to, top, bottom } of range.getClientRects()) {
      const [left, right] = clip ? [Math.max(from, clip.left), Math.min(to, clip.right)] : [from, to];
      const text = node.textContent.trim().slice(0, 40);
      if (right - left > 1) found.push({ text, node: count, left, right, top, bottom });

    }
  }
  return found;
}"""

FAINT = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = numbers(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || element.closest("script, style") || element.disabled || !element.checkVisibility()) continue;
    let opacity = 1;
    for (let at = element; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
    const back = behind(element);
    const ink = numbers(getComputedStyle(element).color).slice(0, 3).map((v, i) => v * opacity + back[i] * (1 - opacity));
    const [low, high] = [luminance(ink), luminance(back)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faint.push(`${element.textContent.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return faint;
}"""

NAMELESS = """() => {
  const named = (element) =>
    ["aria-label", "aria-labelledby"].some((name) => element.getAttribute(name)) || element.labels?.length ||
    (element.matches("button, section") && element.textContent.trim());
  const needing = "button, select, input, [tabindex], [role=img], section[aria-label]";
  const found = [...document.querySelectorAll(needing)].filter((element) => !named(element));
  const images = [...document.querySelectorAll("img")].filter((image) => !image.alt);
  return [...found, ...images].map((element) => element.outerHTML.slice(0, 200));
}"""

WRONG = """<img src="data:,"><button></button><p style="color: #999">faint</p><div style="width: 500px">wide</div>
<div style="position: relative; height: 2em"><span style="position: absolute; left: 0">over</span>
<span style="position: absolute; left: 5px">under</span></div>"""


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of a run with pictures, one of a run on features of its own, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    registers = {f"register_{n}": {"linear": 20.0 * n} for n in (1, 2, 3)}
    factors = {"vision": {"hue": factor(["vision"], **registers), "wood": factor(["vision", "tactile"], readable=False)}}
    numbers = {"rows": 9, "acc1": 20.0, "low": 10.0, "high": 30.0, "acc5": 50.0, "chance1": 1.0, "stage1_acc1": 3.0}
    directions = [
        {"query": a, "gallery": b, "dataset": d} | numbers
        for a, b in (("vision", "tactile"), ("tactile", "vision"))
        for d in (None, "hct", "ssvtp")
    ]
    protocol = {"threshold": 0.6, "acc1": 31.0, "acc5": 80.0, "stage1_acc1": 26.0, "stage1_acc5": 66.0}
    changes = {"factors": factors, "directions": directions, "tvl_protocol": {"text_vision": [protocol] * 4}}
    runs = [write_run(folder / f"{i}", seed=i % 2, acc1=10.0 + i, method=("short", LONG)[i // 2]) for i in range(4)]
    return {
        "run": write_page(write_explored_run(folder / "with pictures" / "run", 40, results=changes)).as_uri(),
        "own": write_page(write_explored_run(folder / "own", modalities=("force", "sound"), files=False)).as_uri(),
        "comparison": write_comparison(runs, folder / "comparison", "tvl-align compare").resolve().as_uri(),
    }


@pytest.fixture(params=[(kind, width) for kind in KINDS for width in WIDTHS], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request: pytest.FixtureRequest, browser: Browser, addresses: dict[str, str]) -> Iterator[Page]:
    kind, width = request.param
    with opened(browser, addresses[kind], width) as made:
        yield made


def overlaps(texts: list[dict[str, float]]) -> list[str]:
    """Pairs of texts of which more than 2 pixels of both lie over each other."""
    texts = sorted(texts, key=lambda t: t["top"])
    found = []
    for i, one in enumerate(texts):
        for other in texts[i + 1 :]:
            if other["top"] > one["bottom"]:
                break
            width = min(one["right"], other["right"]) - max(one["left"], other["left"])
            height = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if width > 2 and height > 4 and one["node"] != other["node"]:  # lines of one text may touch
                found.append(f"{one['text']} / {other['text']}")
    return found


def test_it_can_be_read(page: Page) -> None:
    """No sideways scrolling, no text over another, contrast of 4.5, a name for everything that is no text."""
    width = (page.viewport_size or {})["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    texts = page.evaluate(TEXTS)
    assert len(texts) > 60
    assert max(text["right"] for text in texts) <= width
    assert overlaps(texts) == []
    assert page.evaluate(FAINT) == []
    assert page.evaluate(NAMELESS) == []
    assert page.locator('meta[name="viewport"]').count() == 1


def test_the_checks_find_what_is_wrong(browser: Browser, addresses: dict[str, str]) -> None:
    with opened(browser, addresses["run"], 390) as page:
        page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", WRONG)
        assert page.evaluate("document.documentElement.scrollWidth") > 390
        assert overlaps(page.evaluate(TEXTS)) == ["over / under"]
        assert page.evaluate(FAINT) == ["faint: 2.85"]
        assert len(page.evaluate(NAMELESS)) == 2


def test_made_results_are_those_of_the_page(addresses: dict[str, str], browser: Browser) -> None:
    with opened(browser, addresses["run"], 1400) as page:
        text = page.locator("body").inner_text()
        for part in (
            "ceiling at chance",
            "What each register holds",
            "vision → tactile",
            "20.0 [10.0, 30.0] (9)",
            "31.0 (26.0)",
        ):
            assert part in text, part
        assert made_results()["method"] in text
