"""The split by groups."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tvl_align.data.split import grouped_split


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
