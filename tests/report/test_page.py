"""The page and the terminal tables of one run: every number is where it belongs, and what is undefined is named."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from made_results import factor, made_results, pair, write_run

from tvl_align.report import plots, tables
from tvl_align.report.page import print_table, write_page


def cells(html: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def words(document: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"data:image/png;base64,[^\"]+", "", document)))


def test_rows_of_the_tables() -> None:
    results = made_results()
    assert tables.retrieval_rows(results) == [["tactile-vision", "10.0 [8.0, 13.0]", "30.0", "3.5", "2.5", "66.0", "1.25"]]
    assert tables.summary_rows(results) == [
        ["unique retention", "50 [46, 55]", "11", "22 [20, 23]", "33", "44"],
        ["unique leak", "75 [71, 80]", "11", "22 [20, 23]", "33", "44"],
    ]
    assert tables.factor_rows(results) == [
        ["vision: hue", "vision", "20.0", "80.0 (linear on tokens)", "35.0 / 50.0", "35.0 / 50.0"],
        ["vision: wood", "vision, tactile", "20.0", "21.0 (at chance)", "35.0 / 50.0", "35.0 / 50.0"],
        ["tactile: shape", "tactile", "20.0", "80.0 (linear on tokens)", "20.0 / 80.0", "35.0 / 50.0"],
    ]
    assert tables.r2_rows(results) == []
    name, entry = tables.entries(results["factors"])[0]
    entry["r2"] = {
        g: {"linear": x - 0.5, "mlp": x} for g, x in (("stage1", 0.9), ("overlapping", 0.25), ("complementary", 0.7))
    }
    assert tables.r2_rows(results) == [[name, "0.90", "0.25", "0.70"]]
    assert tables.bits_rows(results)[0] == ["vision: hue", "2.32", "0.12", "0.12", "0.12"]
    assert tables.leak_rows(results)[0] == [
        "vision",
        "shared from complementary",
        "0.30 [0.20, 0.60]",
        "0.10",
        "0.30",
        "0.25",
    ]
    assert [tables.leak(results, name) for name in tables.LEAKS] == [pytest.approx(0.4), 0.0]
    assert tables.prefix_rows(results) == [
        ["1", "5.0 [9.0, 12.0]", "-", "-", "61.0 [60.0, 63.0]", "40.0"],
        ["2", "10.0 [9.0, 12.0]", "5.0 [-1.0, 7.0]", "-", "61.0 [60.0, 63.0]", "40.0"],
    ]
    assert tables.above_ceiling(results) == []
    results["factors"]["tactile"]["shape"]["accuracy"]["overlapping"]["mlp"] = 82.0  # of 80: a score of 103
    results["factors"]["vision"]["wood"]["accuracy"]["overlapping"]["mlp"] = 99.0  # the ceiling is at chance
    assert tables.above_ceiling(results) == ["tactile: shape (103)"]
    assert tables.unreadable(results) == ["vision: wood"]
    assert tables.left_out(results) == ["tactile: fur (3 labelled probe rows with 1 levels, 2 test rows)"]


def test_scores_by_kind_of_probe() -> None:
    shape, wood = factor(["tactile"], overlapping={"linear": 20.0, "mlp": 80.0}), factor([], readable=False)
    assert tables.score(shape, "overlapping", "linear") == 0
    assert tables.score(shape, "overlapping") == 100
    assert tables.score(shape, "complementary") == 50
    assert tables.score(shape, "first_1_registers") is None  # was not read
    assert tables.score(wood, "overlapping") is None
    assert [tables.score_text(s) for s in (49.6, -3.0, None)] == ["50", "-3", "ceiling at chance"]


def test_undefined_numbers_are_dashes() -> None:
    results = made_results(retrieval={"tactile_vision": dict.fromkeys(pair(1.0))}, summary={}, label_free={})
    assert tables.retrieval_rows(results) == [["tactile-vision", *["-"] * 6]]
    assert tables.number(tables.leak(results, tables.LEAKS[0])) == "-"


def test_the_page_has_every_table(tmp_path: Path) -> None:
    html = write_page(write_run(tmp_path / "run")).read_text()
    found = cells(html)
    results = made_results()
    for columns, rows in (
        (tables.RETRIEVAL_COLUMNS, tables.retrieval_rows(results)),
        (tables.SUMMARY_COLUMNS, tables.summary_rows(results)),
        (tables.FACTOR_COLUMNS, tables.factor_rows(results)),
        (tables.BITS_COLUMNS, tables.bits_rows(results)),
        (tables.LEAK_COLUMNS, tables.leak_rows(results)),
        (tables.PREFIX_COLUMNS, tables.prefix_rows(results)),
    ):
        at = found.index(list(columns))
        assert found[at + 1 : at + 1 + len(rows)] == rows
    text = " ".join(html.split())
    for part in (
        "Ceiling at chance, not in the scores: vision: wood.",
        "tactile: fur (3 labelled probe rows with 1 levels, 2 test rows)",
        "80 rows set aside from training",
        "A normalised score places",
        "Usable bits are",
        "Means over modalities: shared from complementary 0.40, unique from overlapping 0.00.",
    ):
        assert part in text, part
    assert html.count("data:image/png;base64,") == 4
    assert "http" not in html
    assert not words(html) & {"nan", "None"}


def test_copies_are_counted_on_the_page(tmp_path: Path) -> None:
    text = " ".join(write_page(write_run(tmp_path / "run", repeated={"vision": 12, "touch": 0})).read_text().split())
    assert "12 rows repeat the vision of another row; such rows are positives" in text
    assert "rows repeat the touch" not in text


def test_a_page_of_a_run_without_labels_or_pairs(tmp_path: Path) -> None:
    """A store with one modality has no pair, nothing to read without labels, and no Acc@1 of a prefix."""
    empty = {
        "acc1": None,
        "low": None,
        "high": None,
        "added": None,
        "pairs": {},
        "reconstructions": {},
        "reconstruction": None,
    }
    prefix = [p | empty for p in made_results()["prefix"]]
    results = made_results(retrieval={}, factors={}, label_free={}, prefix=prefix, controls={"shuffled_acc1": None})
    del results["summary"], results["left_out"]
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text(json.dumps(results))
    html = write_page(run).read_text()
    assert "Retention and leak" not in html
    assert not words(html) & {"nan", "None"}
    print_table(run / "results.json")


def test_rows_of_the_validation_split_are_named() -> None:
    results = made_results(probe_rows={"split": "val", "rows": 9})
    assert tables.probe_rows(results).startswith("9 val rows")


def test_the_terminal_has_the_main_numbers_in_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(write_run(tmp_path / "run", method="[bold]toy") / "results.json")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for row in (
        r"\[bold\]toy v1, seed 0, 100 test rows, in percent",
        r"tactile-vision +10\.0 \[8\.0, 13\.0\] +30\.0 +3\.5 +2\.5 +66\.0 +1\.25",
        r"unique retention +50 \[46, 55\] +11 +22 +33 +44",
        r"unique leak +75 \[71, 80\] +11 +22 +33 +44",
        r"shared from complementary +0\.40",
        r"unique from overlapping +0\.00",
        r"not in the scores: vision: wood\.",
        r"Shuffled partners: mean Acc@1 1\.50",
    ):
        assert re.search(row, text), row
    assert not words(text) & {"nan", "None"}


def drawn(draw: object, monkeypatch: pytest.MonkeyPatch, *values: object) -> plt.Figure:
    """The first figure that a function of `plots` draws."""
    figures: list[plt.Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    draw(*values)  # type: ignore[operator]
    plt.close("all")
    return figures[0]


def test_the_score_table_has_a_scale_for_retention_and_one_for_leak() -> None:
    factors = made_results()["factors"] | {"other": {"free": factor([])}}
    table = tables.score_table(factors)
    rows = dict(table.rows)
    assert (table.heads, table.columns[:3]) == ([("retention", 3), ("leak", 3)], ["linear", "strongest", "untrained"])
    shape = rows["tactile: shape (unique)"]  # unique: retained in complementary tokens, overlapping ones leak
    assert shape is not None
    assert [cell.text for cell in shape] == ["25", "50", "50", "0", "100", "50"]
    assert [cell.shade for cell in shape] == ["retention-2", *["retention-5"] * 2, "leak-0", "leak-10", "leak-5"]
    assert rows["vision: wood (shared)"] is None  # ceiling at chance
    free = rows["other: free"]
    assert free is not None and {cell.shade[:6] for cell in free} == {"share-"}


def test_registers_alone_keep_the_scale_of_their_group() -> None:
    shape = factor(["tactile"], register_1={"linear": 20.0}, register_2={"linear": 80.0})
    table = tables.register_table({"tactile": {"shape": shape}}, overlapping=1)
    assert table is not None
    assert table.heads == [("overlapping", 1), ("complementary", 1)]
    assert table.rows == [("tactile: shape (unique)", [tables.Shaded("0", "leak-0"), tables.Shaded("100", "retention-10")])]
    assert tables.register_table(made_results()["factors"], 1) is None


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours, #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_numbers_can_be_read_on_every_shade() -> None:
    found = tables.shades()
    assert {scale: len(steps) for scale, steps in found.items()} == {"retention": 11, "leak": 11, "share": 11}
    assert min(contrast(*step) for steps in found.values() for step in steps) >= 4.5
    assert contrast("#fff", "#000") == pytest.approx(21)


def test_directions_and_data_sets() -> None:
    both = {"rows": 9, "acc1": 20.0, "low": 10.0, "high": 30.0, "acc5": 50.0, "chance1": 1.0, "stage1_acc1": None}
    directions = [
        {"query": "vision", "gallery": "tactile", "dataset": None} | both,
        {"query": "vision", "gallery": "tactile", "dataset": "hct"} | both | {"rows": 5, "acc1": 40.0},
        {"query": "tactile", "gallery": "vision", "dataset": None} | both | {"acc1": 25.0, "stage1_acc1": 7.0},
    ]
    columns, rows = tables.direction_table({"directions": directions})
    assert columns == ["query → finds", "Acc@1", "Acc@5", "Stage 1", "chance", "hct"]
    assert rows == [
        ["vision → tactile", "20.0 [10.0, 30.0]", "50.0", "-", "1.00", "40.0 [10.0, 30.0] (5)"],
        ["tactile → vision", "25.0 [10.0, 30.0]", "50.0", "7.0", "1.00", "-"],
    ]


def test_protocol_of_tvl() -> None:
    numbers = {"acc1": 31.0, "acc5": 80.0, "stage1_acc1": 26.0, "stage1_acc5": 66.0}
    protocol = {"text_vision": [{"threshold": t} | numbers for t in (0.6356, 0.8591)]}
    columns, rows = tables.tvl_table({"tvl_protocol": protocol})
    assert columns == ["threshold", "0.636", "0.859"]
    assert rows == [["text-vision Acc@1", *["31.0 (26.0)"] * 2], ["text-vision Acc@5", *["80.0 (66.0)"] * 2]]


def test_the_prefix_plot_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(plots.against_k, monkeypatch, made_results()["prefix"]).axes[0]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 9.0), (1.0, 12.0), (2.0, 9.0), (2.0, 12.0)} <= set(map(tuple, band.tolist()))
