"""Split rows into training and validation by group: a group is a press trajectory (HCT) or an image id (SSVTP).

TVL splits by row and samples its not-in-contact rows first. As a result 77% of its validation rows are training rows too.
"""

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Grouped(Protocol):
    """A row that belongs to a group."""

    @property
    def group(self) -> str: ...


R = TypeVar("R", bound=Grouped)


def grouped_split(rows: Sequence[R], val_fraction: float, seed: int) -> tuple[list[R], list[R]]:
    """Split rows into (train, val) so that no group is in both.

    The sorted group names are shuffled with `seed`. Groups then move to validation until it has `val_fraction` of the rows.
    With two groups or more each side keeps at least one. The result does not depend on the order of the rows.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    val_target, val_rows = val_fraction * len(rows), 0
    val_groups: set[str] = set()
    for group in groups[:-1]:
        if val_rows >= val_target:
            break
        val_groups.add(group)
        val_rows += sizes[group]
    return [r for r in rows if r.group not in val_groups], [r for r in rows if r.group in val_groups]
