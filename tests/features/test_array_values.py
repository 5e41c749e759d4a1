"""Values of arrays: strings in bytes, words for no value, numbers that half precision cannot hold, constant modalities."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvl_align.features.arrays import check_arrays, read_npz
from tvl_align.system.console import UserError

RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(6, 4)), RANDOM.normal(size=(6, 3))
NAMES = ["gr\u00f6\u00dfe", "b", "c", "d", "e", "f"]


def in_bytes(texts: list[str]) -> list[bytes]:
    return [text.encode() for text in texts]


@pytest.mark.parametrize("dtype", [object, "S"])
def test_bytes_are_read_as_utf8(dtype: Any, tmp_path: Path) -> None:
    """h5py gives bytes, as numpy strings or as objects."""
    plain = {"names": NAMES, "split": ["train"] * 4 + ["val", "test"], "groups": list("ppqrst")}
    label = ["h\u00e4rte", "weich"] * 3
    strings = check_arrays({"a": A, "b": B}, labels={"x": label}, **plain)
    as_bytes = {k: np.array(in_bytes(v), dtype) for k, v in plain.items()}
    found = check_arrays({"a": A, "b": B}, labels={"x": np.array(in_bytes(label), dtype)}, **as_bytes)
    assert found.names == strings.names == NAMES
    assert found.split.tolist() == plain["split"] and found.labels["x"].tolist() == label
    assert strings.groups is not None and found.groups is not None
    assert found.groups.tolist() == strings.groups.tolist() == plain["groups"]
    if dtype == "S":
        owners = {"owners.x": np.array([b"a", b"b"]), "label.x": np.array(in_bytes(label))}
        np.savez(tmp_path / "x.npz", a=A, b=B, names=as_bytes["names"], **owners)
        read = read_npz(tmp_path / "x.npz")
        assert read.names == NAMES and read.owners == {"x": ("a", "b")} and read.labels["x"].tolist() == label


def test_other_bytes_are_refused() -> None:
    with pytest.raises(UserError, match=r"names has the bytes b'a\\xff', which are not UTF-8; decode them before"):
        check_arrays({"a": A, "b": B}, names=np.array([b"a\xff", *in_bytes(NAMES[1:])], object))


def test_words_for_no_value_are_no_labels(caplog: pytest.LogCaptureFixture) -> None:
    labels = {
        "word": np.array(["wood", "nan", "N/A", "felt", "", "wood"]),
        "number": np.array([1.0, np.nan, 2.0, 1.0, np.nan, 2.0]),  # of few values: classes
        "object": np.array(["wood", None, np.nan, "felt", "-", "x"], object),
    }
    found = check_arrays({"a": A, "b": B}, labels=labels).labels
    assert found["word"].tolist() == ["wood", "", "", "felt", "", "wood"]
    assert found["number"].tolist() == ["1.0", "", "2.0", "1.0", "", "2.0"]
    assert found["object"].tolist() == ["wood", "", "", "felt", "", "x"]
    assert "label.word: 1 rows are 'N/A', which is no label" in caplog.text
    for name in ("names", "groups"):
        with pytest.raises(UserError, match=f"{name} has no value in row 2 \\(1 rows in total\\); give every row one"):
            check_arrays({"a": A, "b": B}, **{name: ["p", "q", "None", "r", "s", "t"]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        (A * 1e-7, "multiply it by 1e\\+07"),
        (A * 1e-9, "multiply it by 1e\\+09"),
        (A * 1e-60, "multiply it by 1e\\+60"),
        (A + 5000, "subtract its mean over the rows"),
        (A * 1e-6 + 1, "subtract its mean over the rows"),
    ],
)
def test_differences_that_half_precision_loses_are_refused(numbers: np.ndarray, remedy: str) -> None:
    with pytest.raises(UserError, match=f"a has values up to .* too little for half precision; {remedy}") as caught:
        check_arrays({"a": numbers, "b": B})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [A * 1e-4, A * 1e4, A + 10, (A * 100).astype(np.int64), A.astype(np.float16)])
def test_numbers_that_half_precision_holds_are_used(numbers: np.ndarray) -> None:
    tokens = check_arrays({"a": numbers, "b": B}).modalities["a"].tokens[:, 0]
    assert np.corrcoef(tokens.astype(np.float16).ravel(), A.ravel())[0, 1] > 0.999 or numbers.dtype != np.float64
    assert np.allclose(tokens, numbers, rtol=1e-6)


def test_a_constant_modality_is_named(caplog: pytest.LogCaptureFixture) -> None:
    constant, present = np.tile(A[:1], (6, 1)), np.array([True] * 5 + [False])
    constant[5] = np.nan
    check_arrays({"a": constant, "b": B}, present={"a": present})
    assert "a is the same in all of its 5 rows: nothing can be learned from it" in caplog.text
    caplog.clear()
    check_arrays({"a": A, "b": B})
    assert "is the same" not in caplog.text


def test_groups_in_more_than_one_given_split_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    split = ["train", "train", "train", "test", "test", "val"]
    found = check_arrays({"a": A, "b": B}, split=split, groups=list("ppqqrp"))
    assert found.split.tolist() == split
    assert "2 of 3 groups are in more than one split: the given split is used" in caplog.text
    caplog.clear()
    check_arrays({"a": A, "b": B}, split=split, groups=list("ppprqq"))
    assert "1 of 3 groups" in caplog.text
    caplog.clear()
    check_arrays({"a": A, "b": B}, split=split, groups=list("pppqqr"))
    assert not caplog.text
