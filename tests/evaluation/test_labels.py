"""Label files: levels, numbers, owners, the factors that captions name; malformed files are refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvl_align.evaluation.labels import read_labels
from tvl_align.system.console import UserError


def write(folder: Path, csv: str, legend: Any = None) -> Path:
    path = folder / "mine.csv"
    path.write_text(csv)
    if legend is not None:
        (folder / "mine.json").write_text(legend if isinstance(legend, str) else json.dumps(legend))
    return path


def test_labels_of_the_world(world: Path) -> None:
    labels = read_labels(world / "factors.csv")
    assert labels.ownership["hue"] == ("vision", "text")
    assert labels.ownership["shape"] == ("tactile",)
    name = next(iter(labels.values))
    assert labels.of("hue", [name, "nowhere"]).tolist()[1] == -1
    assert set(labels.text_factors) <= {f for f, owners in labels.ownership.items() if "text" in owners}
    assert labels.text_factors


def test_plain_labels(tmp_path: Path) -> None:
    mine = read_labels(write(tmp_path, "split,vision,material\ntrain,a.jpg,wood\ntest,b.jpg,\ntest,c.jpg,felt\n"))
    assert mine.levels == {"material": ["felt", "wood"]}
    assert mine.of("material", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]).tolist() == [1, -1, 0, -1]
    assert mine.ownership == {"material": ()}
    assert (mine.numbers, mine.text_factors, mine.named) == ({}, (), {})


def test_numbers_have_five_equally_frequent_levels(tmp_path: Path) -> None:
    rows = "".join(f"r{i},{10**i if i % 2 else i / 7},x\n" for i in range(20)) + "empty,,x\n"
    legend = {"factors": {"force": {"ownership": ["tactile"], "kind": "number"}}}
    mine = read_labels(write(tmp_path, f"row,force,kind\n{rows}", legend))
    assert mine.levels["force"] == [f"quantile {i}" for i in range(1, 6)]
    levels = mine.of("force", [f"r{i}" for i in range(20)])
    assert np.bincount(levels).tolist() == [4] * 5
    values = [mine.numbers["force"][f"r{i}"] for i in range(20)]
    assert values[1] == 10 and values[2] == pytest.approx(2 / 7)
    assert (np.diff(levels[np.argsort(values)]) >= 0).all()  # a larger number has no lower level
    assert mine.of("force", ["empty"]).tolist() == [-1] and "empty" not in mine.numbers["force"]
    assert mine.levels["kind"] == ["x"] and "kind" not in mine.numbers


def test_captions_that_name_only_some_factors(tmp_path: Path) -> None:
    legend = {"factors": {"hue": {"ownership": ["vision", "text"]}}, "text_factors": ["hue", "wood", "gone"]}
    rows = "a,red,oak,x,hue wood\nb,blue,oak,y,wood\nc,red,elm,x,\n"
    mine = read_labels(write(tmp_path, f"row,hue,wood,size,named\n{rows}", legend))
    assert mine.text_factors == ("hue", "wood")
    assert mine.named == {"a": {"hue", "wood"}, "b": {"wood"}, "c": frozenset()}
    assert "named" not in mine.levels
    told = mine.told("text", ["hue", "wood", "size"], ["a", "b", "c"])
    assert told.tolist() == [[1, 1, 0], [-1, 1, 1], [-1, -1, 0]]
    assert mine.told("vision", ["hue", "wood"], ["a", "b", "c"]).tolist() == [[1, 1], [0, 1], [1, 0]]


def test_words_for_no_value_are_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Unless the legend lists them among the levels."""
    rows = "a,nan,none,wood\nb,2,disc,N/A\nc,,None,-\nd,NULL,none,felt\n"
    legend = {"factors": {"print": {"ownership": [], "levels": ["none", "disc"]}, "force": NUMBER["factors"]["force"]}}
    mine = read_labels(write(tmp_path, f"row,force,print,material\n{rows}", legend))
    assert mine.levels["print"] == ["disc", "none"] and mine.levels["material"] == ["felt", "wood"]
    assert mine.of("print", list("abcd")).tolist() == [1, 0, -1, 1]
    assert mine.of("material", list("abcd")).tolist() == [1, -1, -1, 0]
    assert mine.numbers["force"] == {"b": 2.0}
    told = [record.getMessage() for record in caplog.records]
    expected = "1 cells of material are 'N/A', which is no label; list it in `levels` of mine.json if it is one"
    assert f"{tmp_path / 'mine.csv'}: {expected}" in told and len(told) == 5


def test_a_row_that_is_labelled_twice_alike_counts_once(tmp_path: Path) -> None:
    mine = read_labels(write(tmp_path, "row,force\na,1\nb,2\na,1\n", NUMBER))
    assert mine.numbers["force"] == {"a": 1.0, "b": 2.0}


NUMBER: dict[str, Any] = {"factors": {"force": {"ownership": [], "kind": "number"}}}


@pytest.mark.parametrize(
    ("csv", "legend", "message"),
    [
        ("photo,material\na,b\n", None, "needs a vision column"),
        ("row,split,named\na,b,c\n", None, "needs a vision column .* a column per factor"),
        ("row,force\na,b,c\n", None, "more or fewer cells than columns"),
        ("row,force\na,soft\n", NUMBER, "column force is marked as number, but .*'soft'"),
        ("row,force\na,-inf\n", NUMBER, "force of a is not finite"),
        ("row,force\na,1\na,2\n", NUMBER, "two different lines for 'a'; keep one of them"),
        ("row,x,x\na,1,2\n", None, "2 columns named 'x'; keep one of them"),
        ("row,force\na,1e999\n", NUMBER, "force of a is not finite"),
        ("row,force\na,1\n", "{", "is malformed"),
        ("row,force\na,1\n", {"factors": {"force": {}}}, "is malformed .*ownership"),
        ("row,force\na,1\n", {"factors": ["force"]}, "is malformed"),
    ],
)
def test_malformed_files_are_refused_in_one_sentence(tmp_path: Path, csv: str, legend: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_labels(write(tmp_path, csv, legend))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such label file"):
        read_labels(tmp_path / "none.csv")
