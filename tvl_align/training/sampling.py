"""Which rows, in which order, in which view: every draw follows from seed and epoch, on any number of processes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.system.console import UserError
from tvl_align.system.distributed import rank, world_size
from tvl_align.system.runtime import generator


def balanced_weights(datasets: Tensor) -> Tensor:
    """(N,) int64 data set of every row -> (N,) float64: every data set is drawn equally often, however few rows it has."""
    return 1 / datasets.bincount().double()[datasets]


def shard_batches(order: Tensor, joined: int) -> Tensor:
    """(n,) rows -> (steps, b) int64: this process's rows of every joined batch of `joined` rows, -1 where there is none.

    Batches are the same for any number of processes, and all processes take as many steps of as many rows; a row -1 is
    read as a row that lacks every modality. So an incomplete last batch is one like the others.
    """
    steps, each = math.ceil(len(order) / joined), math.ceil(joined / world_size())
    whole = F.pad(order, (0, steps * joined - len(order)), value=-1).view(steps, joined)
    return F.pad(whole, (0, each * world_size() - joined), value=-1)[:, rank() * each : (rank() + 1) * each]


def epoch_batches(
    rows: int, batch_size: int, seed: int, epoch: int, weights: Tensor | None = None, drop_last: bool = True
) -> Tensor:
    """(steps, batch_size) int64: this process's rows of every step of an epoch.

    The order is drawn once for all processes and cut into joined batches of `batch_size` x processes; each process takes
    its slice, so 2 processes see in a step what 1 process sees with twice the batch. A last, smaller batch is left out, or
    with `drop_last` False filled with -1. With `weights` rows are drawn with replacement in proportion to them.
    Raises UserError where no batch is left.
    """
    joined = batch_size * world_size()
    if drop_last and rows < joined:
        raise UserError(
            f"{rows} training rows are fewer than one batch of {joined}; give a smaller --batch_size, or --no_drop_last."
        )
    order = generator(seed, epoch, 0)
    if weights is None:
        drawn = torch.randperm(rows, generator=order)
    else:
        drawn = torch.multinomial(weights, rows, replacement=True, generator=order)
    return shard_batches(drawn[: rows // joined * joined] if drop_last else drawn, joined)


def epoch_views(steps: int, batch_size: int, views: int, seed: int, epoch: int) -> Tensor:
    """(steps, batch_size) int64: the view of every row, 0 (plain) to `views`, all equally likely."""
    drawn = torch.randint(views + 1, (steps, batch_size * world_size()), generator=generator(seed, epoch, 1))
    return drawn[:, rank() * batch_size : (rank() + 1) * batch_size]
