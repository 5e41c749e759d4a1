"""One split, made once: train and validation never share a group (a press trajectory, an image id).

TVL splits by row, and draws its not-in-contact rows first, so that 77% of its validation rows are also trained on.
"""

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Grouped(Protocol):
    @property
    def group(self) -> str: ...


R = TypeVar("R", bound=Grouped)


def grouped_split(rows: Sequence[R], val_fraction: float, seed: int) -> tuple[list[R], list[R]]:
    """Split rows into (train, val) so that no group is in both; depends only on the group names and the seed.

    Groups are shuffled from their sorted names and moved to validation until it holds `val_fraction` of the rows.
    At least one group stays on either side when there are two or more.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    wanted, held = val_fraction * len(rows), 0
    val_groups: set[str] = set()
    for group in groups[:-1]:
        if held >= wanted:
            break
        val_groups.add(group)
        held += sizes[group]
    return [r for r in rows if r.group not in val_groups], [r for r in rows if r.group in val_groups]
