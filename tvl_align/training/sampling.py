"""Sampling of rows and views per epoch. Draws depend only on seed and epoch, not on the number of processes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.system.console import UserError
from tvl_align.system.distributed import rank, world_size
from tvl_align.system.runtime import generator


def balanced_weights(datasets: Tensor) -> Tensor:
    """(N,) int64 data-set index of every row -> (N,) float64 sampling weights; every data set is drawn equally often."""
    return 1 / datasets.bincount().double()[datasets]


def shard_batches(order: Tensor, global_batch: int) -> Tensor:
    """(n,) int64 rows -> (steps, b) int64: the rows of this process in every global batch, padded with -1.

    Global batches are the same for any number of processes, and every process has the same shape. A row -1 is read as a row
    without modalities, so an incomplete last batch needs no special case.
    """
    steps, each = math.ceil(len(order) / global_batch), math.ceil(global_batch / world_size())
    batches = F.pad(order, (0, steps * global_batch - len(order)), value=-1).view(steps, global_batch)
    return F.pad(batches, (0, each * world_size() - global_batch), value=-1)[:, rank() * each : (rank() + 1) * each]


def epoch_batches(
    rows: int, batch_size: int, seed: int, epoch: int, weights: Tensor | None = None, drop_last: bool = True
) -> Tensor:
    """(steps, batch_size) int64: the rows of this process for every step of an epoch.

    All processes draw the same order and split it into global batches of `batch_size` x processes, of which each takes its
    slice. So 2 processes train on the same global batches as 1 process with twice the batch size. drop_last: drop the last
    incomplete batch; False: pad it with -1. weights: (rows,); rows are drawn with replacement in proportion to them.
    Raises UserError if no batch is left.
    """
    global_batch = batch_size * world_size()
    if drop_last and rows < global_batch:
        raise UserError(
            f"{rows} training rows are fewer than one batch of {global_batch}; "
            "give a smaller --batch_size, or --no_drop_last."
        )
    order = generator(seed, epoch, 0)
    if weights is None:
        drawn = torch.randperm(rows, generator=order)
    else:
        drawn = torch.multinomial(weights, rows, replacement=True, generator=order)
    return shard_batches(drawn[: rows // global_batch * global_batch] if drop_last else drawn, global_batch)


def epoch_views(steps: int, batch_size: int, views: int, seed: int, epoch: int, augmented: bool = False) -> Tensor:
    """(steps, batch_size) int64: the view of every row, uniform in 0 (the plain one) to `views`.

    augmented: views show augmented pictures. Then half of the rows show the plain one, from which alone complementary
    registers learn what to hold (tvl_align.losses.register_loss).
    """
    draws, shape = generator(seed, epoch, 1), (steps, batch_size * world_size())
    if augmented and views:
        drawn = torch.randint(1, views + 1, shape, generator=draws) * (torch.rand(shape, generator=draws) < 0.5)
    else:
        drawn = torch.randint(views + 1, shape, generator=draws)
    return drawn[:, rank() * batch_size : (rank() + 1) * batch_size]
