"""Load batches of images with the worker processes of a DataLoader.

Workers hand images over in shared memory, the file system /dev/shm, which a container may limit (Docker: 64 MB). Only as
many batches are loaded at a time as fit into it. A worker that finds it full or is killed ends the job with one sentence.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from tvl_align.data.samples import Samples
from tvl_align.system.console import UserError
from tvl_align.system.files import warn_once
from tvl_align.system.machine import cores
from tvl_align.system.workers import MAX_LANES

SHARED_MEMORY = "/dev/shm"  # where torch shares tensors on Linux
RESERVED = 2**20  # bytes of it that are left to others, such as the locks of the workers
PREFETCH = 2  # batches that a worker loads ahead, where they fit
HELD = MAX_LANES + 1  # batches that may be in use while others are loaded
REMEDY = f"give --num_workers 0, or more memory and a larger {SHARED_MEMORY} (docker run --shm-size 8g)."

RowViews = list[tuple[int, int]]
"""(row, view) pairs of a batch."""


@dataclass(frozen=True)
class ImageBatch:
    """The images of a batch.

    images: {modality: (positions in the batch that have an image, (n, 3, S, S) float32 images)}; inputs of further
    modalities are (n, their shape). faults: (position, modality, reason) of every image that cannot be used.
    """

    images: dict[str, tuple[list[int], Tensor]]
    faults: list[tuple[int, str, str]]

    def pin_memory(self) -> "ImageBatch":
        """The same images in pinned memory. A DataLoader with `pin_memory=True` calls this."""
        return replace(self, images={m: (at, images.pin_memory()) for m, (at, images) in self.images.items()})


def load_images(
    samples: Samples, batches: Sequence[RowViews], num_workers: int, modalities: Sequence[str]
) -> Iterator[ImageBatch]:
    """Yield the images of every batch of (row, view) pairs. Row -1 has no image.

    `num_workers` processes decode and prefetch; the number is capped at the number of cores, of batches, and of batches that
    fit into shared memory. Images are in pinned memory where CUDA is available.

    Raises UserError if a worker dies or finds no shared memory, and the UserErrors of `samples`.
    """
    workers, prefetch = _workers_that_fit(samples, batches, num_workers)
    loader = DataLoader(
        _Batches(samples),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        # Consumes one number of the global generator, whatever the number of workers.
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),
    )
    try:
        for batch in _start(loader):
            if isinstance(batch, UserError):
                raise batch
            faults = [fault for fault in batch.faults if fault[1] in modalities]
            yield ImageBatch({m: images for m, images in batch.images.items() if m in modalities}, faults)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # raised by `samples`, in a worker
            raise
        raise _failed(error) from error


def _workers_that_fit(samples: Samples, batches: Sequence[RowViews], num_workers: int) -> tuple[int, int | None]:
    """(number of workers, batches that each loads ahead): at most so many that all batches in flight fit into shared memory.

    Processes on the same machine share it equally. (0, None) if not even one batch fits, or none is to be loaded.
    """
    wanted = min(num_workers, cores(), len(batches))
    if not wanted:
        return 0, None
    batch_bytes = samples.view_bytes * max(1, *map(len, batches))
    try:
        memory = os.statvfs(SHARED_MEMORY)
    except OSError:  # not Linux
        return wanted, PREFETCH
    if not memory.f_blocks:  # a tmpfs without a limit
        return wanted, PREFETCH
    free = memory.f_bavail * memory.f_frsize // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fit = max(0, (free - RESERVED) // batch_bytes - HELD)
    workers = min(wanted, fit)
    if workers < wanted:
        size = memory.f_blocks * memory.f_frsize / 2**20
        warn_once(  # the same line for all splits and epochs
            f"{SHARED_MEMORY} of {size:.0f} MiB is too small for --num_workers {num_workers}: fewer or none load images, "
            "which is slower; enlarge it (docker run --shm-size 8g)"
        )
    return workers, min(PREFETCH, fit // workers) if workers else None


class _Batches(Dataset[ImageBatch | UserError]):
    """The batches of (row, view) pairs. A UserError is returned: raised in a worker, its message would be a traceback."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, row_views: RowViews) -> ImageBatch | UserError:
        try:
            items = [self.samples[row_view] for row_view in row_views]
        except UserError as error:
            return error
        images: dict[str, tuple[list[int], Tensor]] = {}
        try:
            for modality in self.samples.loaded:
                positions = [i for i, item in enumerate(items) if modality in item.images]
                if positions:  # in a worker default_collate stacks into shared memory
                    images[modality] = positions, default_collate([items[i].images[modality] for i in positions])
        except RuntimeError as error:
            if get_worker_info() is None:
                raise
            return _failed(error)
        return ImageBatch(images, [(i, m, reason) for i, item in enumerate(items) for m, reason in item.faults.items()])


def _unchanged(batch: Any) -> Any:
    return batch


def _failed(error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"a worker process that loads images failed ({reason}); {REMEDY}")


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator over the batches, without PyTorch's signal handler for the death of a worker.

    The handler raises RuntimeError in whatever the main thread is doing. Without it a death is noticed within 5 s of waiting
    for a batch, as it is in other threads.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return loaded
