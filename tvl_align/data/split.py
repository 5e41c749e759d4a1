"""Split rows into training and validation by group: a group is a press trajectory (HCT) or an image id (SSVTP).

TVL splits by row and samples its not-in-contact rows first. As a result 77% of its validation rows are training rows too.
Rows with the same picture under other names are copies. Their groups are joined before the split.
"""

import hashlib
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

TAIL = 4096  # bytes at the end of a file, where compressed pictures of equal size differ


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


def file_keys(files: Mapping[str, Path]) -> dict[str, int]:
    """{name: file} -> {name: key}; two files have the same key if and only if their bytes are equal.

    Only files of equal size are opened, and only those that also end in the same bytes are read to the end. Files that are
    empty or cannot be read are copies of none.
    """
    classes = [list(files)]
    for describe in (_size, _tail, _digest):
        classes = [part for names in classes for part in _classes(names, files, describe)]
    return {name: key for key, part in enumerate(classes) for name in part}


def _classes(names: list[str], files: Mapping[str, Path], describe: Callable[[Path], Hashable]) -> list[list[str]]:
    """Names of files with equal descriptions together. A single file is not described."""
    if len(names) == 1:
        return [names]
    found: dict[Hashable, list[str]] = {}
    for name in names:
        try:
            description = describe(files[name])
        except OSError:
            description = name
        found.setdefault(description or name, []).append(name)
    return list(found.values())


def _size(path: Path) -> int:
    return path.stat().st_size


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def row_keys(contents: Iterable[Hashable | None]) -> np.ndarray:
    """(N,) int64 keys of rows: equal if and only if the contents are; None, no content, has a key of its own."""
    ids: dict[Hashable, int] = {}
    keys = [-1 - row if c is None else ids.setdefault(c, row) for row, c in enumerate(contents)]
    return np.array(keys, dtype=np.int64)


def repeats(keys: np.ndarray) -> int:
    """Number of rows that have the key of an earlier row."""
    return len(keys) - len(np.unique(keys))


def join_groups(groups: Sequence[str], keys: Iterable[np.ndarray]) -> list[str]:
    """The groups of N rows, joined where rows have an equal key in any (N,) array; the least of the joined names is kept."""
    joined = {group: group for group in groups}  # of every group another one of its union, or itself

    def find(group: str) -> str:
        while joined[group] != group:
            joined[group] = group = joined[joined[group]]
        return group

    for column in keys:
        first: dict[int, str] = {}
        for group, key in zip(groups, column.tolist(), strict=True):
            low, high = sorted((find(group), find(first.setdefault(key, group))))
            joined[high] = low
    return [find(group) for group in groups]


def copies_across(keys: Mapping[str, np.ndarray], sides: Sequence[str]) -> int:
    """Number of the N rows that have an equal key in a row of another side. sides: (N,), such as the names of splits."""
    across = np.zeros(len(sides), bool)
    for column in keys.values():
        found: dict[int, set[str]] = {}
        for key, side in zip(column.tolist(), sides, strict=True):
            found.setdefault(key, set()).add(side)
        across |= np.array([len(found[key]) > 1 for key in column.tolist()], bool)
    return int(across.sum())
