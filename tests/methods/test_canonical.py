"""Canonical projections of data with a known shared part, and of noise, against plain NumPy."""

import numpy as np
import pytest
import torch

from tvl_align.methods.canonical import MAX_ROUNDING, MIN_CORRELATION, canonical, residual_components, ridge_regression

ROWS, SHARED = 3000, 2


def planted(seed: int, count: int = 2, rows: int = ROWS, noise: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Shared variables (n, 2) and modalities (n, 8 to 10) of them, of other variables and of noise, all of zero mean."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, SHARED, generator=g)
    modalities = {}
    for i, name in enumerate("abc"[:count]):
        mixing = torch.linalg.qr(torch.randn(8 + i, 8 + i, generator=torch.Generator().manual_seed(i)))[0]
        own = noise * torch.randn(rows, 8 + i - SHARED, generator=g)
        x = torch.cat([shared + 0.5 * torch.randn(rows, SHARED, generator=g), own], dim=1) @ mixing
        modalities[name] = x - x.mean(0)
    return shared - shared.mean(0), modalities


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).mean(0) / (x.std(0, unbiased=False) * y.std(0, unbiased=False))


def explained(target: torch.Tensor, x: torch.Tensor) -> float:
    """Part of the variance of the target that a linear regression on x explains."""
    rest = target - x @ torch.linalg.lstsq(x, target).solution
    return 1 - float(rest.square().sum() / target.square().sum())


def test_correlations_equal_numpys_canonical_correlations() -> None:
    data = planted(0)[1]
    white = [np.linalg.svd(x.double().numpy(), full_matrices=False)[0] for x in data.values()]
    expected = np.linalg.svd(white[0].T @ white[1])[1]
    maps, strengths = canonical(data, 8)
    a, b = (data[m] @ w for m, w in maps.items())
    assert a.shape == (ROWS, SHARED)
    assert np.allclose(correlation(a, b).numpy(), expected[:SHARED], atol=0.01)
    assert torch.allclose(a.std(0), torch.ones(SHARED), atol=1e-3)
    assert all(np.allclose(s.numpy(), expected[:SHARED], atol=0.02) for s in strengths.values())  # on held-out rows
    assert (a.T @ a / ROWS - torch.eye(SHARED)).abs().max() < 0.02


@pytest.mark.parametrize("count", [2, 3])
def test_the_planted_variables_are_found_in_new_rows(count: int) -> None:
    """They have much less variance than what is not shared, so principal components do not find them."""
    maps, strengths = canonical(planted(0, count, noise=4.0)[1], 8)
    shared, data = planted(1, count, noise=4.0)
    for of_modality in strengths.values():
        assert of_modality.tolist() == pytest.approx([0.8] * SHARED, abs=0.05)  # 1 / (1 + 0.5^2)
    variates = {m: data[m] @ w for m, w in maps.items()}
    for m, v in variates.items():
        assert explained(shared, v) > 0.75
        first = torch.linalg.svd(data[m], full_matrices=False)[2][:SHARED]
        assert explained(shared, data[m] @ first.T) < 0.1
    for one in variates.values():
        assert all((correlation(one, other) > 0.7).all() for other in variates.values())


@pytest.mark.parametrize("rows", [20, 400, 2000])
@pytest.mark.parametrize("count", [2, 3])
def test_noise_has_no_shared_directions(rows: int, count: int) -> None:
    """Many features of few rows correlate on these rows, but not on others."""
    g = torch.Generator().manual_seed(rows)
    data = {m: torch.randn(rows, 50, generator=g) for m in "abc"[:count]}
    data = {m: x - x.mean(0) for m, x in data.items()}
    maps, strengths = canonical(data, 24)
    assert [w.shape[1] for w in maps.values()] == [1] * count  # the strongest is kept, so that there is a code
    assert all(0 <= float(s) < MIN_CORRELATION for s in strengths.values())
    if rows == 400:
        assert correlation(*(data[m] @ maps[m] for m in "ab")).abs() > 0.25  # on the rows of the fit


def test_equal_modalities_have_strengths_just_below_one() -> None:
    x = planted(0)[1]["a"]
    strengths = canonical({"a": x, "b": x.clone()}, 4)[1]["b"]
    assert len(strengths) == 4 and (strengths <= MAX_ROUNDING).all() and (strengths > 0.99).all()


def test_at_most_rank_directions_are_kept_in_descending_order() -> None:
    data = planted(0)[1]
    data["b"] = torch.cat([data["b"][:, :4], data["a"] + torch.arange(8) * 0.3 * torch.randn(ROWS, 8)], dim=1)
    data["b"] -= data["b"].mean(0)
    maps, strengths = canonical(data, 5)
    assert maps["a"].shape == (8, 5) and maps["b"].shape == (12, 5)
    assert (strengths["a"][:-1] >= strengths["a"][1:]).all()


def test_what_only_two_of_three_share_is_strong_in_these_and_nothing_in_the_third() -> None:
    """The mean over pairs would be a third of their correlation, and noise of the third as strong as what is shared."""
    g = torch.Generator().manual_seed(0)
    everywhere, pair = torch.randn(2, ROWS, 1, generator=g)
    parts = {"a": [everywhere, pair], "b": [everywhere, pair], "c": [everywhere, torch.randn(ROWS, 1, generator=g)]}
    data = {m: torch.cat([x + 0.7 * torch.randn(ROWS, 1, generator=g) for x in xs], dim=1) for m, xs in parts.items()}
    maps, strengths = canonical({m: x - x.mean(0) for m, x in data.items()}, 2)
    weights = {m: [float(s) for s in strengths[m]] for m in "abc"}
    expected = 1 / (1 + 0.7**2)
    assert weights["a"] == pytest.approx([expected] * 2, abs=0.05) == weights["b"]
    assert sorted(weights["c"]) == pytest.approx([0, expected], abs=0.05)
    (at,) = [i for i, w in enumerate(weights["c"]) if w == 0]
    assert abs(float(correlation(data["a"] @ maps["a"], pair)[at])) > 0.7
    assert not maps["c"][:, at].any() and maps["c"].any()
    own = residual_components(data["c"] - data["c"].mean(0), maps["c"], 1)  # what c alone has stays in what is left
    assert abs(float(correlation(data["c"] @ own, data["c"][:, 1:]))) > 0.95


def test_ridge_regression_equals_numpys() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 4, generator=g), torch.randn(100, 3, generator=g)
    assert np.allclose(ridge_regression(x, y, 0.0).numpy(), np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0], atol=1e-4)
    inner = (x.T @ x).double().numpy()
    expected = np.linalg.solve(inner + 0.5 * np.diag(inner).mean() * np.eye(4), (x.T @ y).double().numpy())
    assert np.allclose(ridge_regression(x, y, 0.5).numpy(), expected, atol=1e-5)


def residual(oblique: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A shared variable (n, 1), a unique one (n, 1) and features (n, 6) of both, in orthogonal or oblique directions."""
    g = torch.Generator().manual_seed(0)
    shared, unique = torch.randn(2, ROWS, 1, generator=g)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=g))[0][:2]
    if oblique:
        directions[1] = (directions[0] + directions[1]) / 2**0.5
    x = 3 * shared * directions[0] + 2 * unique * directions[1] + 0.1 * torch.randn(ROWS, 6, generator=g)
    return shared - shared.mean(0), unique - unique.mean(0), x - x.mean(0)


@pytest.mark.parametrize("oblique", [False, True])
def test_the_residual_is_the_planted_unique_variable(oblique: bool) -> None:
    shared, unique, x = residual(oblique)
    map_ = residual_components(x, torch.linalg.lstsq(x, shared).solution, 1)
    found = x @ map_
    assert float(found.std()) == pytest.approx(1, abs=1e-3)
    least = 0.5 if oblique else 0.99
    assert correlation(found, unique).abs() > least
    if not oblique:
        assert correlation(found, shared).abs() < 0.05


def test_the_residual_is_uncorrelated_with_the_code_in_any_directions() -> None:
    shared, _, x = residual(oblique=True)
    assert correlation(x @ residual_components(x, torch.linalg.lstsq(x, shared).solution, 1), shared).abs() < 0.05


def test_residual_components_of_everything_are_those_of_the_features() -> None:
    """If the code is unrelated to the features, they are principal components, each of unit variance."""
    x = planted(0, noise=2.0)[1]["a"]
    found = x @ residual_components(x, torch.zeros(x.shape[1], 1), 3)
    expected = x @ torch.linalg.svd(x, full_matrices=False)[2][:3].T
    assert explained(expected, found) > 0.98
    assert torch.allclose(found.std(0), torch.ones(3), atol=1e-3)
