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
class ImageBatch:
    """Images of a batch: {modality: (positions in the batch that have it, (n, 3, S, S))}, and (position, modality, reason)
    of those that cannot be used."""

    images: dict[str, tuple[list[int], Tensor]]
    faults: list[tuple[int, str, str]]


def load_images(
    samples: Samples, batches: Sequence[Jobs], num_workers: int, modalities: Sequence[str]
) -> Iterator[ImageBatch]:
    """The images of every batch of (row, view), decoded by workers, a few batches ahead. A row -1 has none."""
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
        yield ImageBatch({m: images for m, images in batch.images.items() if m in modalities}, faults)


def _collate(items: list[Views]) -> ImageBatch:
    found: dict[str, tuple[list[int], Tensor]] = {}
    for modality in ("vision", "tactile"):
        positions = [i for i, item in enumerate(items) if modality in item.images]
        if positions:
            found[modality] = positions, torch.stack([items[i].images[modality] for i in positions])
    return ImageBatch(found, [(i, m, reason) for i, item in enumerate(items) for m, reason in item.faults.items()])
