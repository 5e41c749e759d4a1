"""The page and the terminal tables of one run: every number is where it belongs, and what is undefined is named."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_results import factor, made_results, pair, write_run

from tvl_align.report import plots, tables
from tvl_align.report.page import print_table, write_page


def cells(html: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def words(document: str) -> set[str]:
    return set(re.findall(r"\w+", re.sub(r"data:image/png;base64,[^\"]+", "", document)))


def test_rows_of_the_tables() -> None:
    results = made_results()
    assert tables.retrieval_rows(results) == [["tactile-vision", "10.0 [8.0, 13.0]", "30.0", "3.5", "2.5", "66.0", "1.25"]]
    assert tables.summary_rows(results) == [
        ["unique retention", "50 [46, 55]", "11", "22", "33", "44"],
        ["unique leak", "75 [71, 80]", "11", "22", "33", "44"],
    ]
    assert tables.factor_rows(results) == [
        ["vision: hue", "vision", "20.0", "80.0 (linear on tokens)", "35.0 / 50.0", "35.0 / 50.0"],
        ["vision: wood", "vision, tactile", "20.0", "21.0 (at chance)", "35.0 / 50.0", "35.0 / 50.0"],
        ["tactile: shape", "tactile", "20.0", "80.0 (linear on tokens)", "20.0 / 80.0", "35.0 / 50.0"],
    ]
    assert tables.bits_rows(results)[0] == ["vision: hue", "2.32", "0.12", "0.12", "0.12"]
    assert tables.leak_rows(results)[0] == ["vision", "shared from complementary", "0.10", "0.30", "0.30"]
    assert [tables.leak(results, name) for name in tables.LEAKS] == [pytest.approx(0.4), pytest.approx(-0.2)]
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
        "Means over modalities: shared from complementary 0.40, unique from overlapping -0.20.",
    ):
        assert part in text, part
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html
    assert not words(html) & {"nan", "None"}


def test_copies_are_counted_on_the_page(tmp_path: Path) -> None:
    text = " ".join(write_page(write_run(tmp_path / "run", repeated={"vision": 12, "touch": 0})).read_text().split())
    assert "12 rows repeat the vision of another row; such rows are positives" in text
    assert "rows repeat the touch" not in text


def test_a_page_of_a_run_without_labels_or_pairs(tmp_path: Path) -> None:
    """A store with one modality has no pair, nothing to read without labels, and no Acc@1 of a prefix."""
    empty = {"acc1": None, "low": None, "high": None, "pairs": {}, "reconstructions": {}, "reconstruction": None}
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
        r"unique from overlapping +-0\.20",
        r"not in the scores: vision: wood\.",
        r"Shuffled partners: mean Acc@1 1\.50",
    ):
        assert re.search(row, text), row
    assert not words(text) & {"nan", "None"}


def drawn(draw: object, monkeypatch: pytest.MonkeyPatch, *values: object) -> plt.Figure:
    """The figure that a function of `plots` draws."""
    figures: list[plt.Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    draw(*values)  # type: ignore[operator]
    plt.close(figures[0])
    return figures[0]


def test_the_heat_map_shows_linear_beside_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(plots.heat_map, monkeypatch, made_results()["factors"]).axes[0]
    shown = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert [shown[x, 2] for x in range(4)] == ["0", "100", "25", "50"]  # tactile: shape
    assert not [place for place in shown if place[1] == 1]  # vision: wood, ceiling at chance
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[:3] == ["overlapping\nlinear", "overlapping\nstrongest", "complementary\nlinear"]
    assert axes.get_yticklabels()[0].get_text() == "vision: hue (unique)"


def test_the_prefix_plot_has_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(plots.against_k, monkeypatch, made_results()["prefix"]).axes[0]
    band = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 9.0), (1.0, 12.0), (2.0, 9.0), (2.0, 12.0)} <= set(map(tuple, band.tolist()))


def test_the_heat_map_leaves_a_cell_without_a_score_grey_and_empty() -> None:
    figure, axes = plt.subplots()
    plots._show_scores(axes, np.array([[50.0, np.nan], [np.nan, 120.0]]))
    assert [text.get_text() for text in axes.texts] == ["50", "120"]
    image = axes.images[0]
    figure.canvas.draw()
    opaque = image.to_rgba(image.get_array())[..., 3]
    assert opaque.tolist() == [[1, 0], [0, 1]]
    red, green, blue, _ = axes.get_facecolor()
    assert red == green == blue
    plt.close(figure)
