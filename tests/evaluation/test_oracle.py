"""The oracle against a simulation that breaks ties at random, and cases that can be worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from tvl_align.evaluation.oracle import compatible, expected_accuracy, oracle


def simulated(scores: Tensor, positive: Tensor, k: int, draws: int = 3000) -> float:
    """Acc@k in percent with ties broken by sorting on a random number."""
    draw, hits = torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        order = torch.rand(scores.shape, generator=draw).argsort(1)
        ranked = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
        hits += int(positive.gather(1, ranked[:, :k]).any(1).sum())
    return 100 * hits / draws / len(scores)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 5])
def test_expected_accuracy_is_that_of_random_tie_breaking(seed: int, k: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(3, (8, 8), generator=draw).float()
    scores[torch.rand(8, 8, generator=draw) < 0.2] = -torch.inf
    positive = torch.eye(8, dtype=torch.bool) | (torch.rand(8, 8, generator=draw) < 0.15)
    assert expected_accuracy(scores, positive, k) == pytest.approx(simulated(scores, positive, k), abs=2.5)


def test_scores_of_levels() -> None:
    """Different levels exclude each other; what is not told excludes nothing; a match counts by the number of levels."""
    first, second = torch.tensor([[0, 3], [1, -1]]), torch.tensor([[0, 3], [0, 2], [-1, -1], [1, 0]])
    both = math.log(2) + math.log(4)
    expected = [[both, -math.inf, 0.0, -math.inf], [-math.inf, -math.inf, 0.0, math.log(2)]]
    for row, wanted in zip(compatible(first, second).tolist(), expected, strict=True):
        assert row == pytest.approx(wanted)


def test_pairs_that_differ_are_all_found_and_equal_ones_by_chance() -> None:
    levels = torch.arange(10)[:, None]
    own = torch.eye(10, dtype=torch.bool)
    assert oracle(levels, levels, own) == (100, 100)
    assert oracle(torch.zeros_like(levels), torch.zeros_like(levels), own) == (pytest.approx(10), pytest.approx(50))
    twins = torch.arange(10)[:, None] // 2
    assert oracle(twins, twins, own) == (pytest.approx(50), pytest.approx(100))
    assert oracle(twins, twins, twins == twins.T) == (100, 100)  # an equal row is a positive too


def test_a_direction_that_is_not_told() -> None:
    """The first side tells only of row 0: from it, row 0 is found and the others by chance; the mean of both directions."""
    first, second = torch.tensor([[0], [-1], [-1], [-1]]), torch.arange(4)[:, None]
    own = torch.eye(4, dtype=torch.bool)
    one, other = compatible(first, second), compatible(second, first)
    assert expected_accuracy(one, own, 1) == pytest.approx(100 * (1 + 3 * 0.25) / 4)
    assert expected_accuracy(other, own, 1) == pytest.approx(100 * (1 + 3 / 3) / 4)
    assert oracle(first, second, own)[0] == pytest.approx((43.75 + 50) / 2)
