"""Predictors' loss and encoders' penalty equal plain loops, and measure dependence that no correlation of units shows."""

import math

import numpy as np
import pytest
import torch

from tvl_align.losses.independence import LEAST_VARIANCE, SPARE, independence, moment_count, moments
from tvl_align.registers.copies import Mlps

NAMES = ("vision", "tactile", "text")
Named = dict[str, torch.Tensor]


def inputs(seed: int, rows: int = 7, units: int = 3) -> tuple[Named, Named, Named]:
    g = torch.Generator().manual_seed(seed)
    codes = {m: torch.randn(rows, units, generator=g) for m in NAMES}
    predicted = {m: torch.randn(rows, moment_count(units), generator=g) for m in NAMES}
    return codes, predicted, {m: torch.rand(rows, generator=g) > 0.3 for m in NAMES}


def slow(codes: Named, predicted: Named, valid: Named) -> tuple[float, float]:
    """One modality and one moment at a time."""
    losses, penalties = [], []
    for m in codes:
        rows = [i for i in range(len(valid[m])) if valid[m][i]]
        if not rows:
            continue
        units = codes[m].shape[1]
        columns = [[float(codes[m][i, u]) for i in rows] for u in range(units)]
        columns += [
            [a * b for a, b in zip(columns[u], columns[v], strict=True)] for u in range(units) for v in range(u, units)
        ]
        guesses = [[float(predicted[m][i, k]) for i in rows] for k in range(len(columns))]
        losses.append(np.mean([np.mean(np.subtract(g, c) ** 2) for g, c in zip(guesses, columns, strict=True)]))
        penalty = 0.0
        for g, c in zip(guesses, columns, strict=True):
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
    codes, predicted, valid = inputs(0)
    valid["text"] = torch.zeros(7, dtype=torch.bool)
    expected = slow(codes, predicted, valid)
    for given in (codes, predicted):
        for m in NAMES:
            given[m][~valid[m]] = torch.nan
            given[m].requires_grad_()
    terms = independence(codes, predicted, valid)
    assert [x.item() for x in terms] == pytest.approx(expected, rel=1e-4)
    sum(terms).backward()
    assert all(x.grad.isfinite().all() for given in (codes, predicted) for x in given.values())
    none = {m: torch.zeros(7, dtype=torch.bool) for m in NAMES}
    assert [x.item() for x in independence(codes, predicted, none)] == [0, 0]


def test_the_extremes_of_the_penalty() -> None:
    """What does not correlate costs nothing; what is predicted exactly costs a finite price, and has a gradient still. A
    constant code, a constant prediction and a single row are not predicted."""
    code = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], requires_grad=True)
    everyone, other = {"text": torch.ones(4, dtype=torch.bool)}, torch.tensor([1.0, 1.0, -1.0, -1.0])

    def penalty(first: torch.Tensor, of: torch.Tensor = code) -> torch.Tensor:
        rows = {"text": everyone["text"][: len(of)]}
        return independence({"text": of}, {"text": torch.stack([first, torch.zeros_like(first)], 1)}, rows)[1]

    assert penalty(other).item() == pytest.approx(0, abs=1e-6)
    certain = penalty(-5 * code[:, 0].detach())
    assert certain.item() == pytest.approx(0.5 * math.log((1 + SPARE) / SPARE), rel=1e-4)
    changed = penalty(torch.tensor([1.0, -1.0, 1.0, -0.9]))
    assert torch.autograd.grad(changed, code)[0].abs().max() > 0.1
    constant, single = penalty(other, torch.ones(4, 1)), penalty(other[:1], code[:1])
    assert [x.item() for x in (penalty(torch.ones(4)), constant, single)] == [0, 0, 0]


def test_the_penalty_does_not_depend_on_the_scale_of_code_or_prediction() -> None:
    codes, predicted, valid = inputs(1, rows=30)
    scaled = {m: 3 * x for m, x in codes.items()}, {m: 0.1 * x + 2 for m, x in predicted.items()}, valid
    assert independence(*scaled)[1].item() == pytest.approx(independence(codes, predicted, valid)[1].item(), rel=1e-4)


def test_each_term_has_gradients_for_its_own_side_only() -> None:
    codes, predicted, valid = inputs(2)
    for x in (*codes.values(), *predicted.values()):
        x.requires_grad_()
    loss, penalty = independence(codes, predicted, valid)
    of_loss, of_penalty = (
        torch.autograd.grad(term, [codes["text"], predicted["text"]], allow_unused=True, retain_graph=True)
        for term in (loss, penalty)
    )
    assert [g is not None and bool(g.any()) for g in of_loss] == [False, True]
    assert [g is not None and bool(g.any()) for g in of_penalty] == [True, False]


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
        return independence({"text": code}, {"text": predictor(shared)[0]}, everyone)

    for _ in range(150):
        optimizer.zero_grad()
        terms()[0].backward()
        optimizer.step()
    with torch.no_grad():
        return float(terms(2048)[1])


def test_dependence_is_found_where_no_unit_correlates() -> None:
    assert trained("nothing") < 0.05
    assert min(trained(hides) for hides in ("unit", "square", "product")) > 0.5
