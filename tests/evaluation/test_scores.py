"""Normalised scores by hand, and the t interval against scipy."""

import numpy as np
import pytest
from scipy import stats

from tvl_align.evaluation.scores import normalised_score, t_interval


def test_normalised_score() -> None:
    assert normalised_score(20, 20, 80) == 0
    assert normalised_score(80, 20, 80) == 100
    assert normalised_score(5, 20, 80) == -25
    with pytest.raises(ValueError, match="not above chance"):
        normalised_score(50, 50, 50)


@pytest.mark.parametrize("count", [2, 3, 5, 12, 100])
def test_the_t_interval_is_that_of_scipy(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).tolist()
    expected = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-4)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least two values"):
        t_interval([1.0])
