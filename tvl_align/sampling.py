"""Which rows, in which order, in which view: every draw follows from seed and epoch, on any number of processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tvl_align.console import UserError
from tvl_align.runtime import generator, rank, world_size


def balanced_weights(datasets: Sequence[str]) -> Tensor:
    """(N,) float: every data set is drawn equally often, however few rows it has."""
    counts = {name: datasets.count(name) for name in set(datasets)}
    return torch.tensor([1.0 / counts[name] for name in datasets], dtype=torch.float64)


def epoch_batches(rows: int, batch_size: int, seed: int, epoch: int, weights: Tensor | None = None) -> Tensor:
    """(steps, batch_size) int64: this process's rows of every step of an epoch.

    The order is drawn once for all processes and cut into joined batches of `batch_size` x processes; each process takes
    its slice, so 2 processes see in a step what 1 process sees with twice the batch. A last, smaller batch is left out.
    With `weights` rows are drawn with replacement in proportion to them. Raises UserError for fewer rows than a batch.
    """
    joined = batch_size * world_size()
    if rows < joined:
        raise UserError(f"{rows} training rows are fewer than one batch of {joined}; give a smaller --batch_size.")
    order = generator(seed, epoch, 0)
    if weights is None:
        drawn = torch.randperm(rows, generator=order)
    else:
        drawn = torch.multinomial(weights, rows, replacement=True, generator=order)
    steps = rows // joined
    mine = slice(rank() * batch_size, (rank() + 1) * batch_size)
    return drawn[: steps * joined].view(steps, joined)[:, mine]


def epoch_views(steps: int, batch_size: int, views: int, seed: int, epoch: int) -> Tensor:
    """(steps, batch_size) int64: the view of every row, 0 (plain) to `views`, all equally likely."""
    drawn = torch.randint(views + 1, (steps, batch_size * world_size()), generator=generator(seed, epoch, 1))
    return drawn[:, rank() * batch_size : (rank() + 1) * batch_size]


def evaluation_rows(rows: int) -> Tensor:
    """(n,) int64: this process's contiguous share of the rows, in order."""
    return torch.arange(rows).tensor_split(world_size())[rank()]
