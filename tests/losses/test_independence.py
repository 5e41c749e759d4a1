"""Predictors' loss and encoders' penalty equal plain loops, and measure dependence that no correlation of units shows."""

import math

import numpy as np
import pytest
import torch

from tvl_align.losses.independence import LEAST_VARIANCE, SPARE, independence, moment_count, moments
from tvl_align.registers.copies import Mlps

NAMES = ("vision", "tactile", "text")
Named = dict[str, torch.Tensor]


def inputs(seed: int, rows: int = 7, count: int = 3) -> tuple[Named, Named]:
    """Targets, predictions of them, the same again, (rows, 3, count); and rows that count."""
    g = torch.Generator().manual_seed(seed)
    predictions = {m: torch.randn(rows, 2, count, generator=g)[:, [0, 1, 1]] for m in NAMES}
    return predictions, {m: torch.rand(rows, generator=g) > 0.3 for m in NAMES}


def slow(predictions: Named, valid: Named) -> tuple[float, float]:
    """One modality and one target at a time."""
    losses, penalties = [], []
    for m, x in predictions.items():
        rows = [i for i in range(len(valid[m])) if valid[m][i]]
        if not rows:
            continue
        targets, learnt, judged = ([[float(x[i, part, k]) for i in rows] for k in range(x.shape[2])] for part in range(3))
        losses.append(np.mean([np.mean(np.subtract(g, c) ** 2) for g, c in zip(learnt, targets, strict=True)]))
        penalty = 0.0
        for g, c in zip(judged, targets, strict=True):
            covariance = np.mean((np.array(g) - np.mean(g)) * (np.array(c) - np.mean(c)))
            explained = covariance**2 / max(np.var(g) * np.var(c), LEAST_VARIANCE)
            penalty -= 0.5 * math.log(1 - explained / (1 + SPARE))
        penalties.append(penalty)
    return float(np.mean(losses or [0.0])), float(np.mean(penalties or [0.0]))


@pytest.mark.parametrize("seed", range(8))
def test_both_terms_equal_plain_loops(seed: int) -> None:
    given = inputs(seed, rows=4 + seed)
    found = [float(x) for x in independence(*given)]
    assert found == pytest.approx(
        slow(*given), rel=2e-3, abs=1e-5
    )  # correlations of two rows are 1, where logarithms are steep


def test_rows_that_do_not_count_may_hold_anything() -> None:
    predictions, valid = inputs(0)
    valid["text"] = torch.zeros(7, dtype=torch.bool)
    expected = slow(predictions, valid)
    for m, x in predictions.items():
        x[~valid[m]] = torch.nan
        x.requires_grad_()
    terms = independence(predictions, valid)
    assert [x.item() for x in terms] == pytest.approx(expected, rel=1e-4)
    sum(terms).backward()
    assert all(x.grad.isfinite().all() for x in predictions.values())
    none = {m: torch.zeros(7, dtype=torch.bool) for m in NAMES}
    assert [x.item() for x in independence(predictions, none)] == [0, 0]


def test_the_extremes_of_the_penalty() -> None:
    """What does not correlate costs nothing; what is predicted exactly costs a finite price, and has a gradient still. A
    constant code, a constant prediction and a single row are not predicted."""
    code = torch.tensor([1.0, -1.0, 1.0, -1.0], requires_grad=True)
    other = torch.tensor([1.0, 1.0, -1.0, -1.0])

    def penalty(prediction: torch.Tensor, of: torch.Tensor = code) -> torch.Tensor:
        given = torch.stack([of, prediction, prediction], 1)[..., None]
        return independence({"text": given}, {"text": torch.ones(len(of), dtype=torch.bool)})[1]

    assert penalty(other).item() == pytest.approx(0, abs=1e-6)
    certain = penalty(-5 * code.detach())
    assert certain.item() == pytest.approx(0.5 * math.log((1 + SPARE) / SPARE), rel=1e-4)
    changed = penalty(torch.tensor([1.0, -1.0, 1.0, -0.9]))
    assert torch.autograd.grad(changed, code)[0].abs().max() > 0.1
    constant, single = penalty(other, torch.ones(4)), penalty(other[:1], code[:1])
    assert [x.item() for x in (penalty(torch.ones(4)), constant, single)] == [0, 0, 0]


def test_the_penalty_does_not_depend_on_the_scale_of_code_or_prediction() -> None:
    predictions, valid = inputs(1, rows=30)
    scale, offset = torch.tensor([[3.0], [1.0], [0.1]]), torch.tensor([[0.0], [0.0], [2.0]])
    scaled = {m: x * scale + offset for m, x in predictions.items()}
    assert independence(scaled, valid)[1].item() == pytest.approx(independence(predictions, valid)[1].item(), rel=1e-4)


def test_each_term_has_gradients_for_its_own_side_only() -> None:
    """The loss for the first predictions, the penalty for the targets and the second predictions."""
    predictions, valid = inputs(2)
    x = predictions["text"].requires_grad_()
    of_loss, of_penalty = (torch.autograd.grad(t, x, retain_graph=True)[0] for t in independence(predictions, valid))
    assert [bool(of_loss[:, i].any()) for i in range(3)] == [False, True, False]
    assert [bool(of_penalty[:, i].any()) for i in range(3)] == [True, False, True]


def test_moments_are_units_and_all_products() -> None:
    assert moments(torch.tensor([[2.0, 3.0, 5.0]])).tolist() == [[2, 3, 5, 4, 6, 10, 9, 15, 25]]
    assert moments(torch.zeros(2, 3, 12)).shape == (2, 3, moment_count(12))


def trained(hides: str) -> float:
    """The penalty on new rows, of a code that tells the shared code nothing, in a unit, in a square or in a product."""
    torch.manual_seed(0)
    predictor = Mlps(1, 4, 64, moment_count(2))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)

    def terms(rows: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
        shared, sign = torch.randn(1, rows, 4), torch.randn(rows).sign()
        told = shared[0, :, 0]
        code = {
            "nothing": torch.randn(rows, 2),
            "unit": torch.stack([told, sign], 1),
            "square": torch.stack([sign * told.exp().clamp(max=4), torch.randn(rows)], 1),
            "product": torch.stack([sign, sign * told], 1),
        }[hides]
        everyone = {"text": torch.ones(rows, dtype=torch.bool)}
        prediction = predictor(shared)[0]
        return independence({"text": torch.stack([moments(code), prediction, prediction], 1)}, everyone)

    for _ in range(150):
        optimizer.zero_grad()
        terms()[0].backward()
        optimizer.step()
    with torch.no_grad():
        return float(terms(2048)[1])


def test_dependence_is_found_where_no_unit_correlates() -> None:
    assert trained("nothing") < 0.05
    assert min(trained(hides) for hides in ("unit", "square", "product")) > 0.5
