"""README.md: short, honest in its first screen, with the figures of docs/results.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def rows_of(page: str, first: str) -> dict[str, list[str]]:
    """{first cell: the other cells} of the table whose header starts with `first`, without emphasis and brackets."""
    table = re.search(rf"^\| {re.escape(first)}.*?(?=\n\n)", page, re.M | re.S)
    assert table is not None
    lines = table[0].replace("**", "").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {re.sub(r" \(.*", "", name): [re.sub(r" \[.*", "", cell) for cell in rest] for name, *rest in cells}


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 90


def test_the_second_paragraph_says_what_was_never_measured() -> None:
    second = " ".join(README.split("\n\n")[2].split())
    assert "synthetic data" in second
    assert "Never measured: real TVL checkpoints and TVL data." in second


def test_the_table_has_the_figures_of_the_results() -> None:
    short, full = rows_of(README, "synthetic, test rows"), rows_of(RESULTS, "three worlds, test rows")
    assert short == {name: full[name] for name in short}
    assert len(short) == 8
    assert short["unique retention"][0].startswith("86.6")
    assert short["shared leak"][0].startswith("7.1")


def test_the_table_of_other_data_has_the_figures_of_the_results() -> None:
    """Those of TacTip, of both contacts; the others are somewhere in the results."""
    short, tactip = rows_of(README, "data of others"), rows_of(RESULTS, "TacTip, test rows")
    assert short.items() >= {name: cells for name, cells in tactip.items() if name in short}.items()
    assert len(short.keys() & tactip.keys()) >= 6
    robot = short["UR5, a robot: Acc@1 of effort and force; error of rebuilding from 1 to 4 registers"][0]
    assert robot and all(figure in RESULTS for figure in robot.split("; "))


def test_every_link_and_picture_exists() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_every_page_is_linked() -> None:
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {Path(link).name for link in re.findall(r"\]\(([^)#\s]+)", README)}
