"""Intervals by a bootstrap over groups of test rows, which are not independent."""

import torch
from torch import Tensor

from tvl_align.evaluation.scores import COVERAGE
from tvl_align.system.runtime import generator

RESAMPLES = 1000


def group_weights(groups: Tensor, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """(Q,) int64 groups -> (R, Q) float32: how often each row is drawn if whole groups are drawn with replacement."""
    index = groups.unique(return_inverse=True)[1]
    count = int(index.max()) + 1
    drawn = torch.randint(count, (resamples, count), generator=generator(seed, 8))
    times = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))
    return times[:, index]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Means of (Q,) values under (R, Q) weights -> (R,); rows that are NaN are left out."""
    known = values.isfinite()
    total, count = (weights @ torch.stack([torch.where(known, values, 0.0), known], dim=1).float()).unbind(1)
    return total / count.clamp(min=1e-9)


def interval(samples: Tensor) -> tuple[float, float]:
    """The central 95% of resampled values (R,) -> (low, high)."""
    tail = (1 - COVERAGE) / 2
    low, high = samples.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
