"""Canonical projections on synthetic tokens with a known shared part."""

import numpy as np
import torch

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.methods.canonical import CanonicalProjection, _whitening
from tvl_align.metrics.retrieval import retrieval

ROWS, SHARED = 2000, 4


def tokens_of(x: torch.Tensor) -> Tokens:
    rows, count = x.shape[:2]
    return Tokens(x, torch.ones(rows, count, dtype=torch.bool), x.mean(1), torch.ones(rows, dtype=torch.bool))


def synthetic_tokens(seed: int, rows: int = ROWS) -> dict[str, Tokens]:
    """Noise tokens with a shared source, added at one position and subtracted at another, so the mean over positions cancels
    it."""
    g = torch.Generator().manual_seed(seed)
    source = torch.randn(rows, SHARED, generator=g)
    tokens_by_modality = {}
    for i, (name, count, width) in enumerate((("a", 6, 12), ("b", 5, 10))):
        mixing = torch.randn(SHARED, width, generator=torch.Generator().manual_seed(i))
        tokens = torch.randn(rows, count, width, generator=g)
        tokens[:, 1] += source @ mixing
        tokens[:, 3] -= source @ mixing
        tokens_by_modality[name] = tokens_of(tokens)
    return tokens_by_modality


def specs() -> dict[str, FeatureSpec]:
    return {"a": FeatureSpec(12, 6, 12), "b": FeatureSpec(10, 5, 10)}


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0)).clamp(min=1e-9)


def test_finds_the_shared_directions() -> None:
    projection = CanonicalProjection(specs(), 8)
    projection.fit([synthetic_tokens(0)])
    fresh = synthetic_tokens(1)
    a, b = (projection(m, t.tokens, t.mask) for m, t in fresh.items())
    correlations = correlation(a, b)
    assert (correlations[:SHARED] > 0.6).all()
    assert (correlations[SHARED:].abs() < 0.25).all()
    assert (a.var(0)[:-1] >= a.var(0)[1:] * 0.8).all()  # highest correlation first
    everyone = torch.ones(ROWS, dtype=torch.bool)

    def acc1(x: torch.Tensor, y: torch.Tensor) -> float:
        return retrieval(*(torch.nn.functional.normalize(v, dim=-1) for v in (x, y)), everyone).acc1

    assert acc1(a, b) > 2  # chance: 0.05
    assert acc1(fresh["a"].tokens.mean(1)[:, :10], fresh["b"].tokens.mean(1)) < 0.5  # the means contain no shared part


def test_correlations_equal_numpys_canonical_correlations() -> None:
    data = synthetic_tokens(0)
    projection = CanonicalProjection(specs(), SHARED)
    projection.fit([data])
    flat = [projection.flatten(m, t.tokens, t.mask).double().numpy() for m, t in data.items()]
    flat = [x - x.mean(0) for x in flat]
    white = [np.linalg.svd(x, full_matrices=False)[0] for x in flat]
    expected = np.linalg.svd(white[0].T @ white[1])[1][:SHARED]
    a, b = (projection(m, t.tokens, t.mask) for m, t in data.items())
    assert np.allclose(correlation(a, b).numpy(), expected, atol=0.02)


def test_the_fit_does_not_depend_on_the_batches() -> None:
    data = synthetic_tokens(0, 300)
    whole, parts = CanonicalProjection(specs(), 3), CanonicalProjection(specs(), 3)
    whole.fit([data])
    parts.fit([{m: t.map(lambda x, i=i: x[i : i + 70]) for m, t in data.items()} for i in range(0, 300, 70)])
    for m, t in data.items():
        one, other = whole(m, t.tokens, t.mask), parts(m, t.tokens, t.mask)
        assert torch.allclose(correlation(one, other).abs(), torch.ones(3), atol=1e-3)


def test_the_sketched_whitening_equals_the_full_one() -> None:
    rows = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    rows -= rows.mean(0)
    covariance = rows.T @ rows / 20
    sketched, full = _whitening(covariance, 19), _whitening(covariance, 60)[:, :19]
    assert torch.allclose(sketched @ sketched.T, full @ full.T, atol=1e-3 * float((full @ full.T).abs().max()))


def test_zero_until_fitted_and_with_too_few_rows() -> None:
    projection, data = CanonicalProjection(specs(), 3), synthetic_tokens(0, 1)
    projection.fit([data])
    assert not projection.fitted
    assert not projection("a", data["a"].tokens, data["a"].mask).any()


def test_long_and_wide_sequences_are_averaged_and_narrowed() -> None:
    projection = CanonicalProjection({"a": FeatureSpec(512, 40, 8), "b": FeatureSpec(10, 5, 10)}, 3)
    tokens = torch.randn(2, 40, 512)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 3:] = False
    flat = projection.flatten("a", tokens, mask)
    assert flat.shape[1] <= 4096
    first = torch.nn.functional.layer_norm(tokens, (512,)) @ projection.narrow_a
    assert torch.allclose(flat[0, : first.shape[-1]], first[0, :3].mean(0), atol=1e-5)
    assert torch.allclose(flat[1, : first.shape[-1]], first[1, :3].mean(0), atol=1e-5)
    assert not flat[1, first.shape[-1] :].any()
