"""Parts of a split, as feature sources: probe rows set aside from the training rows, and a control with shuffled pairs."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tvl_align.contract import Features
from tvl_align.features.store import Condense, FeatureSource
from tvl_align.system.runtime import generator

MAX_PROBE_FRACTION = 0.25  # of the training rows


class RowSubset:
    """Some rows of a split, (K,) int64, as a feature source; rows are renumbered from 0."""

    def __init__(self, source: FeatureSource, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.views, self.augmented = source.views, source.augmented
        self.names = _Selected(source.names, rows)
        self.datasets, self.groups = source.datasets[rows], source.groups[rows]
        self.content_keys = {m: keys[rows] for m, keys in source.content_keys.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """Yield the Features of every (rows, views) pair on `device`. See FeatureSource."""
        inner = [torch.where(row >= 0, self.rows[row.clamp(min=0)], -1) for row in rows]
        for row, features in zip(rows, self.source.batches(inner, views, device), strict=True):
            yield replace(features, rows=row.to(device))

    def condensed(self, condense: Condense, device: torch.device) -> FeatureSource:
        """The same rows of the condensed split."""
        return RowSubset(self.source.condensed(condense, device), self.rows)


class _Selected(Sequence[str]):
    """The names of some rows, read on access."""

    def __init__(self, names: Sequence[str], rows: Tensor) -> None:
        self.names, self.rows = names, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> object:  # type: ignore[override]
        if isinstance(index, slice):
            return [self.names[row] for row in self.rows[index].tolist()]
        return self.names[int(self.rows[index])]


class ShuffledPairs:
    """Control: the rows of a split with every modality but the first taken from another, random row.

    What a method still finds in such pairs is chance. Costs one read per modality.
    """

    def __init__(self, source: FeatureSource, modalities: Sequence[str], seed: int) -> None:
        self.source, self.names = source, source.names
        self.views, self.augmented = source.views, source.augmented
        self.datasets, self.groups = source.datasets, source.groups
        self.orders = {
            m: torch.randperm(len(source), generator=generator(seed, 7, i)) if i else torch.arange(len(source))
            for i, m in enumerate(modalities)
        }
        self.content_keys = {m: keys[self.orders[m]] for m, keys in source.content_keys.items() if m in self.orders}

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """Yield the Features of every (rows, views) pair on `device`. See FeatureSource."""
        orders = list(self.orders.values())
        inner = [torch.where(row >= 0, order[row.clamp(min=0)], -1) for row in rows for order in orders]
        read = self.source.batches(inner, [view for view in views for _ in orders], device)
        for row in rows:
            parts = dict(zip(self.orders, [next(read) for _ in orders], strict=True))
            text = parts.get("text", next(iter(parts.values())))
            modalities = {m: part.modalities[m] for m, part in parts.items() if m in part.modalities}
            content = {m: parts[m].content_keys[m] for m in self.content_keys}
            augmented = {m: parts[m].augmented[m] for m in self.augmented if m in parts}
            yield Features(modalities, text.caption_keys, row.to(device), content, augmented)

    def condensed(self, condense: Condense, device: torch.device) -> FeatureSource:
        """The same pairs of the condensed split."""
        result = copy.copy(self)
        result.source = self.source.condensed(condense, device)
        return result


def set_probe_rows_aside(source: FeatureSource, count: int, seed: int) -> tuple[RowSubset, RowSubset]:
    """Split training rows into (training rows, probe rows), by group: probes are fitted on rows that no model has seen.

    Whole groups move to the probe rows until there are `count`, at most MAX_PROBE_FRACTION of all rows.
    """
    groups = source.groups.unique(return_inverse=True)[1]
    sizes = groups.bincount()
    order = torch.randperm(len(sizes), generator=generator(seed, 6))
    wanted = min(count, int(MAX_PROBE_FRACTION * len(source)))
    order = order[sizes[order] <= wanted]
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[sizes[order].cumsum(0) <= wanted]] = True
    return RowSubset(source, (~chosen[groups]).nonzero().squeeze(1)), RowSubset(source, chosen[groups].nonzero().squeeze(1))
