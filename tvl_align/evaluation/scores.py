"""Numbers of reports that follow from measured numbers: normalised scores, mean leaks, t intervals. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

COVERAGE = 0.95  # of intervals


def normalised_score(score: float, chance: float, ceiling: float = 100.0) -> float:
    """Normalised score: 0 = chance, 100 = ceiling. Raises ValueError if the ceiling is not above chance."""
    if not ceiling > chance:
        raise ValueError(f"the ceiling {ceiling} is not above chance {chance}")
    return 100 * (score - chance) / (ceiling - chance)


def strongest(read: Mapping[str, float]) -> float:
    """The R2 of the strongest probe: {kind of probe: R2, "half": with half of the rows, "low" and "high": its interval} ->
    the largest R2 of a kind."""
    return max(value for name, value in read.items() if name not in ("half", "low", "high"))


def mean_leak(readings: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> float | None:
    """The R2 of the strongest probe, averaged over modalities; None if no modality could be read. Below 0 counts as 0."""
    scores = [max(0.0, strongest(entry[name])) for entry in readings.values() if name in entry]
    return sum(scores) / len(scores) if scores else None


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
