"""Intervals: the bootstrap over groups against a plain loop, and its coverage."""

import numpy as np
import pytest
import torch

from tvl_align.evaluation.uncertainty import Estimate, group_weights, interval, mean_estimate, weighted_mean


def test_weights_draw_whole_groups() -> None:
    groups = torch.tensor([7, 3, 7, 9, 3, 7])
    weights = group_weights(groups, seed=0, resamples=2000)
    assert weights.shape == (2000, 6)
    for group in (3, 7, 9):
        of_group = weights[:, groups == group]
        assert (of_group == of_group[:, :1]).all()  # rows of a group are drawn together
    per_group = weights[:, [1, 0, 3]]
    assert (per_group.sum(1) == 3).all()  # as many groups as there are
    assert per_group.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.08)
    assert torch.equal(weights, group_weights(groups, seed=0, resamples=2000))
    assert not torch.equal(weights, group_weights(groups, seed=1, resamples=2000))


def test_means_equal_those_of_a_plain_loop() -> None:
    groups = torch.tensor([0, 0, 1, 2, 2, 2])
    values = torch.tensor([1.0, 0.0, torch.nan, 1.0, 1.0, 0.0])
    weights = group_weights(groups, seed=4, resamples=50)
    found = weighted_mean(values, weights)
    for mean, times in zip(found.tolist(), weights.int().tolist(), strict=True):
        drawn = [v for v, n in zip(values.tolist(), times, strict=True) for _ in range(n) if not np.isnan(v)]
        assert mean == pytest.approx(np.mean(drawn) if drawn else 0.0)


def test_the_interval_is_central() -> None:
    assert interval(torch.arange(1001).float()) == (pytest.approx(25), pytest.approx(975))


def test_estimates_are_paired_and_lie_within_their_intervals() -> None:
    samples = torch.arange(1001).float()
    one, other = Estimate(500.0, samples), Estimate(499.0, samples - 1)
    assert one.entries("acc1", prefix="") == {"acc1": 500.0, "low": pytest.approx(25), "high": pytest.approx(975)}
    assert one.minus(other).entries("added") == {"added": 1.0, "added_low": 1.0, "added_high": 1.0}
    both = mean_estimate([one, Estimate(0.0, -samples)])
    assert both.value == 250 and both.samples.abs().max() == 0
    assert both.entries("x") == {"x": 250.0, "x_low": 0.0, "x_high": 250.0}


def covered(rows_per_group: int, by_group: bool, repeats: int = 300) -> float:
    """How often the interval of 60 groups of identical rows contains the true mean, 0.3."""
    rng, hits = np.random.default_rng(0), 0
    for i in range(repeats):
        values = torch.tensor(np.repeat(rng.random(60) < 0.3, rows_per_group)).float()
        groups = torch.arange(len(values)) // (rows_per_group if by_group else 1)
        low, high = interval(weighted_mean(values, group_weights(groups, i, 300)))
        hits += low <= 0.3 <= high
    return hits / repeats


def test_coverage_of_independent_groups() -> None:
    assert 0.90 <= covered(1, by_group=True) <= 0.98
    assert 0.90 <= covered(4, by_group=True) <= 0.98
    assert covered(4, by_group=False) < 0.75  # rows of a group are no independent rows


def test_identical_rows_widen_the_interval() -> None:
    values = (torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    alone = interval(weighted_mean(values, group_weights(torch.arange(200), 0)))
    copies, groups = values[:50].repeat_interleave(4), torch.arange(50).repeat_interleave(4)
    grouped = interval(weighted_mean(copies, group_weights(groups, 0)))
    assert grouped[1] - grouped[0] == pytest.approx(2 * (alone[1] - alone[0]), rel=0.2)
