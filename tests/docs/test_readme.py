"""README.md: short, honest in its first screen, with the figures of docs/results.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def rows_of(page: str) -> list[list[str]]:
    """The cells of the first table of figures of a page, without emphasis and without what is in brackets in first cells."""
    table = re.search(r"^\| mean of five.*?(?=\n\n)", page, re.M | re.S)
    assert table is not None
    lines = table[0].replace("**", "").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [[re.sub(r" \(.*", "", line[0]), *line[1:]] for line in cells]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 90


def test_the_second_paragraph_says_what_was_never_measured() -> None:
    second = " ".join(README.split("\n\n")[2].split())
    assert "synthetic data" in second
    assert "Never measured: real TVL checkpoints and TVL data." in second


def test_the_table_has_the_figures_of_the_results() -> None:
    short, full = rows_of(README), {line[0]: line for line in rows_of(RESULTS)}
    assert len(short) == 7
    for line in short:
        assert line == full[line[0]]
    losses = {line[0]: line[1] for line in short}
    assert losses["unique retention"].startswith("81")
    assert losses["shared leak"].startswith("13")


def test_every_link_and_picture_exists() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_every_page_is_linked() -> None:
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {Path(link).name for link in re.findall(r"\]\(([^)#\s]+)", README)}
