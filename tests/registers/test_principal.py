"""Principal components of token sequences equal NumPy's, and a row is read alike whatever its batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tvl_align.contract import Features, FeatureSpec, Tokens
from tvl_align.registers.principal import PrincipalComponents, feature_shape, leading_eigenvectors


def tokens_of(x: torch.Tensor, mask: torch.Tensor | None = None, present: torch.Tensor | None = None) -> Tokens:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    present = torch.ones(len(x), dtype=torch.bool) if present is None else present
    return Tokens(x, mask, x[:, 0, :3] * 2 + 1, present)


def fitted(tokens: Tokens, components: int, parts: int = 1) -> PrincipalComponents:
    """Components of modality "a", fitted on these rows in `parts` batches."""
    torch.manual_seed(0)
    spec = FeatureSpec(tokens.tokens.shape[2], tokens.tokens.shape[1], tokens.pooled.shape[1])
    principal = PrincipalComponents({"a": spec}, components)

    def batches() -> Iterator[Features]:
        for at in torch.arange(len(tokens.present)).chunk(parts):
            yield Features({"a": tokens.map(lambda t, at=at: t[at])}, at[:, None], at)

    principal.fit(batches)
    return principal


def covariance(size: int, decay: float) -> torch.Tensor:
    """A covariance with eigenvalues decay^i, in random directions."""
    q = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]
    return (q * decay ** torch.arange(size)) @ q.T


@pytest.mark.parametrize(("size", "count"), [(40, 25), (200, 12)], ids=["eigh", "subspace"])
def test_leading_eigenvectors_equal_numpys(size: int, count: int) -> None:
    c = covariance(size, 0.9)
    values, vectors = leading_eigenvectors(c, count)
    expected, basis = np.linalg.eigh(c.double().numpy())
    assert np.allclose(values.numpy(), expected[::-1][:count], rtol=1e-3)
    first = basis[:, ::-1][:, :count]
    assert np.allclose((vectors @ vectors.T).numpy(), first @ first.T, atol=1e-3)


def test_a_flat_spectrum_is_found_approximately() -> None:
    """Of pure noise, whose eigenvalues hardly differ, the subspace holds almost the largest variance there is."""
    x = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0))
    values = leading_eigenvectors(x.T @ x / 2000, 64)[0]
    expected = np.linalg.eigvalsh((x.T @ x / 2000).double().numpy())[::-1][:64]
    assert 0.96 < float(values.sum()) / expected.sum() <= 1 + 1e-5


def test_the_read_out_equals_numpys_pca() -> None:
    """Of the sequence of normalised tokens, without the rows and positions that are absent; also in several batches."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, 4, generator=g) @ torch.randn(4, 4, generator=g)
    mask, present = torch.rand(60, 5, generator=g) > 0.2, torch.rand(60, generator=g) > 0.2
    x[~present] = 50.0
    tokens = tokens_of(x, mask, present)
    flat = F.layer_norm(x, (4,)).double().numpy() * mask[..., None].numpy()
    flat, pooled = flat.reshape(60, 20)[present], tokens.pooled.double().numpy()[present]
    centred = flat - flat.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(flat))
    values, vectors = values[::-1][:6], vectors[:, ::-1][:, :6]
    expected = centred @ vectors / np.sqrt(values.mean())
    centred_pooled = pooled - pooled.mean(0)
    for parts in (1, 4):
        read, rest = fitted(tokens, 6, parts)("a", tokens)
        signs = np.sign((read[present, :6].numpy() * expected).sum(0))
        assert np.allclose(read[present, :6].numpy(), expected * signs, atol=2e-3)
        assert np.allclose(read[present, 6:].numpy(), centred_pooled / np.sqrt(centred_pooled.var(0).mean()), atol=1e-3)
        residual = centred - centred @ vectors @ vectors.T
        assert np.allclose(rest[present].numpy(), (residual**2).mean(1), atol=1e-3)
        assert np.allclose(read[present, :6].square().mean().item(), 1, atol=1e-3)


def test_a_row_is_read_alike_in_every_batch() -> None:
    """A text of 3 tokens alone, cut after 3 tokens, and beside one of 9 tokens; sequences of more than 17 are averaged."""
    for length in (9, 40):
        x = torch.randn(30, length, 6, generator=torch.Generator().manual_seed(0))
        principal = fitted(tokens_of(x), 8)
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, 3:] = False
        both = principal("a", tokens_of(x[:2], mask))
        alone = principal("a", Tokens(x[1:2, :3], mask[1:2, :3], x[1:2, 0, :3] * 2 + 1, torch.ones(1, dtype=torch.bool)))
        assert float(F.cosine_similarity(both[0][1:], alone[0])) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(both[1][1:], alone[1], atol=1e-5)


def test_long_sequences_are_averaged_over_segments_of_real_tokens() -> None:
    x, mask = torch.randn(2, 40, 6), torch.ones(2, 40, dtype=torch.bool)
    mask[1, 4:] = False
    principal = PrincipalComponents({"a": FeatureSpec(6, 40, 3)}, 8)
    flat = principal.flatten("a", x, mask).unflatten(1, (-1, 6))
    normal = F.layer_norm(x, (6,))
    assert flat.shape[1] == feature_shape(FeatureSpec(6, 40, 3))[0] == 14
    assert torch.allclose(flat[0, 1], normal[0, 3:6].mean(0), atol=1e-6)
    assert torch.allclose(flat[0, 13], normal[0, 39], atol=1e-6)
    assert torch.allclose(flat[1, 1], normal[1, 3], atol=1e-6)
    assert not flat[1, 2:].any()


def gram(read: torch.Tensor) -> torch.Tensor:
    """Inner products of rows (B, K), relative to their mean square."""
    centred = read - read.mean(0)
    return centred @ centred.T / centred.square().sum(1).mean()


@pytest.mark.parametrize("length", [20, 33])
def test_a_fine_reading_holds_the_coarse_one(length: int) -> None:
    """Of as many components as there are numbers, the coarse ones are those of the averaged sequence, largest variance
    first; a half as long last segment counts half. Short sequences are read one way."""
    x = torch.randn(300, length, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    mask = torch.ones(300, length, dtype=torch.bool)
    tokens, short = tokens_of(x), tokens_of(x[:, :5])
    specs = {"a": FeatureSpec(3, length, 3), "b": FeatureSpec(3, 5, 3)}
    principal = PrincipalComponents(specs, 1000, fine=True)
    assert principal.segments == {"a": 1, "b": 1} and PrincipalComponents(specs, 8).segments == {"a": 2, "b": 1}
    principal.fit(lambda: iter([Features({"a": tokens, "b": short}, torch.zeros(300, 1), torch.arange(300))]))
    read, of_short = principal("a", tokens)[0], principal("b", short)[0]
    both = torch.stack([read, F.pad(of_short, (0, read.shape[1] - of_short.shape[1]))])
    coarse = principal.coarsened(both)
    averaged = PrincipalComponents(specs, 8).flatten("a", x, mask).unflatten(1, (-1, 3))
    weight = torch.full((averaged.shape[1], 1), 2.0)
    weight[-1] -= length % 2
    count = principal.counts["a"]
    assert torch.allclose(gram(coarse[0, :, :count]), gram((averaged * weight.sqrt()).flatten(1)), atol=1e-4)
    variances = coarse[0, :, :count].var(0)
    assert (variances.diff() <= 1e-4).all() and float(variances.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(coarse[0, :, count:], both[0, :, count:])
    assert torch.allclose(coarse[1], both[1])


def test_wide_tokens_are_narrowed_by_their_principal_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal of rank 3 in tokens of width 40 survives the narrowing to 8, which a random projection would lose."""
    monkeypatch.setattr("tvl_align.registers.principal.MAX_SIZE", 40)
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(400, 5, 3, generator=g)
    x = signal @ (3 * torch.randn(3, 40, generator=g)) + 0.3 * torch.randn(400, 5, 40, generator=g)
    assert feature_shape(FeatureSpec(40, 5, 3)) == (5, 8)
    assert PrincipalComponents({"a": FeatureSpec(40, 5, 3)}, 500).counts == {"a": 40}

    def explained(principal: PrincipalComponents) -> float:
        """Part of the variance of the normalised tokens that is left after narrowing."""
        normal = F.layer_norm(x, (40,)).flatten(0, 1)
        normal = normal - normal.mean(0)
        return float((normal @ principal.get_buffer("narrow_a")).square().sum() / normal.square().sum())

    torch.manual_seed(0)
    assert explained(PrincipalComponents({"a": FeatureSpec(40, 5, 3)}, 40)) < 0.5
    principal = fitted(tokens_of(x), 40, parts=3)
    assert explained(principal) > 0.98
    scores = principal("a", tokens_of(x))[0][:, :40].double().numpy()
    target = F.layer_norm(x, (40,)).flatten(1).double().numpy()
    target = target - target.mean(0)
    predicted = scores @ np.linalg.lstsq(scores, target, rcond=None)[0]
    assert ((target - predicted) ** 2).sum() < 0.03 * (target**2).sum()


def test_squared_error_is_that_of_the_rebuilt_features() -> None:
    x = torch.randn(50, 5, 4, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(x)
    principal = fitted(tokens, 7)
    read, rest = principal("a", tokens)
    rebuilt = read[:, :7] + torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    features = principal.flatten("a", x, tokens.mask)
    explicit = rebuilt * principal.get_buffer("scale_a")[0] @ principal.get_buffer("vectors_a").T
    expected = (features - principal.get_buffer("mean_a") - explicit).square().mean(1)
    assert torch.allclose(principal.squared_error("a", read, rebuilt, rest), expected, atol=1e-5)
    assert torch.allclose(principal.squared_error("a", read, read[:, :7], rest), rest)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_than_components_give_finite_results(rows: int) -> None:
    x = torch.randn(rows, 5, 4, generator=torch.Generator().manual_seed(0))
    principal = fitted(tokens_of(x), 12)
    read, rest = principal("a", tokens_of(torch.randn(6, 5, 4)))
    assert read.isfinite().all() and rest.isfinite().all()
    assert bool(principal.fitted)
    if rows > 1:
        kept = principal("a", tokens_of(x))
        assert not kept[0][:, rows - 1 : 12].any()
        assert torch.allclose(kept[1], torch.zeros(rows), atol=1e-5)  # rows - 1 directions hold all of them


def test_constant_features_and_absent_modalities_give_finite_results() -> None:
    constant = tokens_of(torch.arange(20.0).reshape(1, 5, 4).expand(30, 5, 4).clone())
    read, rest = fitted(constant, 12)("a", constant)
    assert read.isfinite().all() and read.abs().max() < 10 and rest.abs().max() < 1e-6
    absent = tokens_of(torch.randn(30, 5, 4), present=torch.zeros(30, dtype=torch.bool))
    principal = fitted(absent, 12)
    assert all(part.isfinite().all() for part in principal("a", absent))
    assert torch.equal(principal.get_buffer("scale_a"), torch.ones(2))
