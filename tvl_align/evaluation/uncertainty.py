"""Intervals by a bootstrap over groups of test rows, which are not independent."""

from collections.abc import Sequence
from typing import NamedTuple

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


class Estimate(NamedTuple):
    """A number, and what it is on resampled test rows, (R,)."""

    value: float
    samples: Tensor

    def minus(self, other: "Estimate") -> "Estimate":
        """The paired difference: both were resampled with the same weights."""
        return Estimate(self.value - other.value, self.samples - other.samples)

    def entries(self, name: str, prefix: str | None = None) -> dict[str, float]:
        """Entries of results.json: {name: value, name_low, name_high: the 95% interval}; prefix: instead of "name_".

        Clamped samples can all lie on one side of the value; it is inside its interval nevertheless."""
        low, high = interval(self.samples)
        prefix = f"{name}_" if prefix is None else prefix
        return {name: self.value, f"{prefix}low": min(low, self.value), f"{prefix}high": max(high, self.value)}


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of numbers that were resampled with the same weights."""
    values, samples = zip(*estimates, strict=True)
    return Estimate(sum(values) / len(values), torch.stack(samples).mean(0))
