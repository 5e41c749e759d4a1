"""Batches of decoded images, by worker processes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tvl_align.data.samples import Samples, Views

Jobs = list[tuple[int, int]]


@dataclass(frozen=True)
class Loaded:
    """Pictures of a batch: {modality: (positions in the batch that have it, (n, 3, S, S))}, and (position, modality, reason)
    of those that cannot be used."""

    pictures: dict[str, tuple[list[int], Tensor]]
    faults: list[tuple[int, str, str]]


def load_pictures(
    samples: Samples, batches: Sequence[Jobs], num_workers: int, modalities: Sequence[str]
) -> Iterator[Loaded]:
    """The pictures of every batch of (row, view), decoded by workers, a few batches ahead. A row -1 has none."""
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(num_workers, os.cpu_count() or 1, len(batches)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),  # one draw, however many workers there are
    )
    for batch in loader:
        faults = [fault for fault in batch.faults if fault[1] in modalities]
        yield Loaded({m: pictures for m, pictures in batch.pictures.items() if m in modalities}, faults)


def _collate(items: list[Views]) -> Loaded:
    found: dict[str, tuple[list[int], Tensor]] = {}
    for modality in ("vision", "tactile"):
        positions = [i for i, item in enumerate(items) if modality in item.pictures]
        if positions:
            found[modality] = positions, torch.stack([items[i].pictures[modality] for i in positions])
    return Loaded(found, [(i, m, reason) for i, item in enumerate(items) for m, reason in item.faults.items()])
