"""Intervals: a bootstrap over groups of test rows, which are not independent, and the t interval of independent values."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tvl_align.system.runtime import generator

RESAMPLES = 1000
COVERAGE = 0.95


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


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% t interval of the mean of independent values: (low, high). Raises ValueError for fewer than two values."""
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(values)}")
    half = _t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half


@cache
def _t_quantile(freedom: int) -> float:
    """The value below which a t variable lies with probability (1 + COVERAGE) / 2, by integration of its density."""
    at = np.linspace(0, 13, 20_001)  # 12.7 with one degree of freedom
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(at**2 / freedom))
    between = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(at))])
    return float(np.interp(COVERAGE / 2, between, at))
