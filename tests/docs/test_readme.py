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
    """Of nine runs, then of one world."""
    short = rows_of(README, "synthetic, test rows")
    nine, world = rows_of(RESULTS, "| `base` 6.2 | half"), rows_of(RESULTS, "world 1, test rows")
    assert len(short) == 7
    for name, (first, *others) in short.items():
        assert first == nine[name][0]
        assert others == world[name]
    assert short["unique retention"][0].startswith("84.3")
    assert short["shared leak"][0].startswith("10.8")


def test_the_table_of_other_data_has_the_figures_of_the_results() -> None:
    short, tactip = rows_of(README, "data of others"), rows_of(RESULTS, "| `base` 6.2, three seeds")
    assert short["TacTip, real touch images: Acc@1"][0] == tactip["Acc@1"][0]
    names = ("unique retention", "shared leak", "unique leak")
    assert short["TacTip: unique retention; shared leak; unique leak"][0] == "; ".join(tactip[name][0] for name in names)
    assert short["UR5, a robot: error of rebuilding from 1 to 4 registers"][0] in RESULTS


def test_every_link_and_picture_exists() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_every_page_is_linked() -> None:
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {Path(link).name for link in re.findall(r"\]\(([^)#\s]+)", README)}
