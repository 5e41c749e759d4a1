"""The split by groups, and groups with the same picture."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tvl_align.data.split as module
from tvl_align.data.split import copies_across, file_keys, grouped_split, join_groups, repeats, row_keys


@dataclass(frozen=True)
class Item:
    group: str
    number: int


items = st.lists(st.builds(Item, st.sampled_from("abcdefghijklm"), st.integers(0, 99)), min_size=1, max_size=60)


@given(items, st.integers(0, 50), st.randoms())
def test_no_group_is_in_both_splits_for_any_order(rows: list[Item], seed: int, rng: object) -> None:
    """The split depends on the sorted group names and the seed only."""
    train, val = grouped_split(rows, 0.1, seed)
    assert not {r.group for r in train} & {r.group for r in val}
    assert sorted(train + val, key=repr) == sorted(rows, key=repr)
    assert train
    if len({r.group for r in rows}) > 1:
        assert val
    shuffled = list(rows)
    rng.shuffle(shuffled)
    again = grouped_split(shuffled, 0.1, seed)
    assert {r.group for r in again[1]} == {r.group for r in val}


def test_the_split_depends_on_the_seed_and_has_the_given_fraction() -> None:
    rows = [Item(str(i // 4), i) for i in range(1000)]
    first, second = (grouped_split(rows, 0.1, seed)[1] for seed in (0, 1))
    assert {r.group for r in first} != {r.group for r in second}
    assert 100 <= len(first) < 104


def test_files_have_the_same_key_if_their_bytes_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files of equal size are opened, and only those with equal ends are read to the end."""
    large = b"x" * 9000
    contents = {
        "one": b"1" + large,
        "copy": b"1" + large,
        "other start": b"2" + large,
        "other end": b"1" + large[:-1] + b"y",
        "other size": b"1",
        "empty": b"",
        "empty too": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    opened: dict[str, list[str]] = {"_tail": [], "_digest": []}
    for step, names in opened.items():
        describe = getattr(module, step)
        monkeypatch.setattr(module, step, lambda p, names=names, describe=describe: (names.append(p.name), describe(p))[1])
    files = {name: tmp_path / name for name in (*contents, "missing", "missing too")}
    keys = file_keys(files)
    assert keys["one"] == keys["copy"]
    assert len(set(keys.values())) == len(files) - 1
    assert opened == {"_tail": ["one", "copy", "other start", "other end"], "_digest": ["one", "copy", "other start"]}
    assert file_keys({}) == {}


def test_rows_without_content_repeat_nothing() -> None:
    keys = row_keys(["a", None, "b", "a", None])
    assert keys[0] == keys[3] and repeats(keys) == 1 and len(set(keys.tolist())) == 4


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 9), st.integers(0, 9)), max_size=20), st.randoms())
def test_groups_are_joined_as_a_graph_is_connected(rows: list[tuple[str, int, int]], rng: random.Random) -> None:
    """The twin follows equal groups and keys from row to row until nothing new is found."""
    groups, columns = [r[0] for r in rows], [np.array([r[k] for r in rows], dtype=np.int64) for k in (1, 2)]
    joined = join_groups(groups, columns)
    for i in range(len(rows)):
        reached = {i}
        while more := {
            j
            for j in range(len(rows))
            if j not in reached and any(a == b for k in reached for a, b in zip(rows[k], rows[j], strict=True))
        }:
            reached |= more
        assert [joined[j] == joined[i] for j in range(len(rows))] == [j in reached for j in range(len(rows))]
        assert joined[i] == min(groups[j] for j in reached)


def test_copies_on_two_sides_are_counted() -> None:
    keys = {"vision": np.array([0, 0, 1, 2, 1]), "tactile": np.array([5, 6, 7, 8, 9])}
    assert copies_across(keys, ["train", "test", "train", "test", "train"]) == 2
    assert copies_across(keys | {"tactile": np.array([5, 6, 7, 8, 7])}, ["train", "train", "train", "test", "test"]) == 2
    assert copies_across(keys, ["train", "train", "test", "test", "test"]) == 0
    assert copies_across({}, []) == 0
