"""Load batches of images with the worker processes of a DataLoader."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tvl_align.data.samples import Samples, Views

RowViews = list[tuple[int, int]]
"""(row, view) pairs of a batch."""


@dataclass(frozen=True)
class ImageBatch:
    """The images of a batch.

    images: {modality: (positions in the batch that have an image, (n, 3, S, S) float32 images)}. faults: (position,
    modality, reason) of every image that cannot be used.
    """

    images: dict[str, tuple[list[int], Tensor]]
    faults: list[tuple[int, str, str]]


def load_images(
    samples: Samples, batches: Sequence[RowViews], num_workers: int, modalities: Sequence[str]
) -> Iterator[ImageBatch]:
    """Yield the images of every batch of (row, view) pairs. Row -1 has no image.

    `num_workers` processes decode and prefetch; the number is capped at the number of cores and of batches. Images are in
    pinned memory where CUDA is available.
    """
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(num_workers, os.cpu_count() or 1, len(batches)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Consumes one number of the global generator, whatever the number of workers.
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
    )
    for batch in loader:
        faults = [fault for fault in batch.faults if fault[1] in modalities]
        yield ImageBatch({m: images for m, images in batch.images.items() if m in modalities}, faults)


def _collate(items: list[Views]) -> ImageBatch:
    stacked: dict[str, tuple[list[int], Tensor]] = {}
    for modality in ("vision", "tactile"):
        positions = [i for i, item in enumerate(items) if modality in item.images]
        if positions:
            stacked[modality] = positions, torch.stack([items[i].images[modality] for i in positions])
    return ImageBatch(stacked, [(i, m, reason) for i, item in enumerate(items) for m, reason in item.faults.items()])
