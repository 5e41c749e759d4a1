"""Losses equal their reference implementations and closed forms."""

import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tvl_align.losses.complementary import diversity, log_error, masked_mean, token_norm
from tvl_align.losses.contrastive import hits_at, info_nce, positive_mask
from tvl_align.registers.decoder import reconstruction_error


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000), st.data())
def test_info_nce_equals_the_reference(rows: int, seed: int, data: st.DataObject) -> None:
    x, y = unit(rows, 5, seed), unit(rows, 5, seed + 1)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    captions = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))[:, None]
    positives = positive_mask(captions, captions)
    loss = info_nce(x, y, torch.tensor(7.0), positives, valid, valid)
    expected = reference.info_nce(x.numpy(), y.numpy(), 7.0, positives.numpy(), valid.numpy())
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_info_nce_with_one_positive_is_cross_entropy() -> None:
    x, y = unit(16, 8, 0), unit(16, 8, 1)
    eye, everyone = torch.eye(16, dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    loss = info_nce(x, y, torch.tensor(14.0), eye, everyone, everyone) / 16
    assert torch.allclose(loss, F.cross_entropy(14.0 * x @ y.T, torch.arange(16)))


def test_info_nce_of_equal_features_is_log_of_the_gallery_size() -> None:
    x = torch.ones(10, 4) / 2
    eye, everyone = torch.eye(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    assert float(info_nce(x, x, torch.tensor(5.0), eye, everyone, everyone) / 10) == pytest.approx(math.log(10))


def test_rows_without_the_modality_have_no_effect() -> None:
    """Rows with a missing modality are left out; the values in their place have no effect."""
    x, y = unit(6, 4, 0), unit(6, 4, 1)
    valid = torch.tensor([True, True, False, True, False, True])
    eye = torch.eye(6, dtype=torch.bool)
    full = info_nce(x, y, torch.tensor(9.0), eye, valid, valid)
    rest = valid.nonzero().squeeze(1)
    alone = info_nce(x[rest], y[rest], torch.tensor(9.0), eye[:4, :4], valid[rest], valid[rest])
    assert torch.allclose(full, alone)
    x.requires_grad_()
    y = y.clone()
    y[~valid] = 1e6
    info_nce(x, y, torch.tensor(9.0), eye, valid, valid).backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~valid].any()


def test_equal_captions_are_positives() -> None:
    keys = torch.tensor([[1, 10], [1, 11], [2, 11], [3, 12]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert positive_mask(keys, keys).int().tolist() == expected


def test_diversity_of_a_single_token_is_zero_with_gradients() -> None:
    """The default has one complementary token, and a mean over no pairs would be NaN."""
    tokens = torch.randn(3, 1, 8, requires_grad=True)
    loss = diversity(tokens, torch.ones(3, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not tokens.grad.any()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_diversity_equals_the_reference(rows: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens, kept = torch.randn(rows, count, 6, generator=g), torch.rand(rows, count, generator=g) > 0.3
    expected = reference.diversity(tokens.numpy(), kept.numpy())
    assert float(diversity(tokens, kept)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_diversity_of_orthogonal_and_parallel_tokens() -> None:
    kept = torch.ones(1, 2, dtype=torch.bool)
    assert float(diversity(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), kept)) == 0
    assert float(diversity(torch.tensor([[[1.0, 1.0], [-2.0, -2.0]]]), kept)) == pytest.approx(1)


def test_norm_and_reconstruction_error_ignore_masked_tokens() -> None:
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    norm = token_norm(tokens, torch.tensor([[True, False]]))
    norm.backward()
    assert norm.item() == pytest.approx(5)
    assert torch.isfinite(tokens.grad).all()
    reconstructed, frozen = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]])
    result = reconstruction_error(reconstructed, frozen, torch.tensor([[True, False]]))
    assert result.error.tolist() == [[pytest.approx(1, abs=1e-4), 0]]
    assert reconstruction_error(F.layer_norm(frozen, (3,)) + 2, frozen, result.mask).error.tolist() == [
        [pytest.approx(4)] * 2
    ]
    assert float(masked_mean(result.error, result.mask)) == pytest.approx(1, abs=1e-4)


def test_the_logarithm_of_errors_has_the_gradient_of_relative_errors() -> None:
    errors = torch.tensor([0.0, 0.01, 0.5], requires_grad=True)
    found = log_error(errors, 0.01)
    assert found.tolist() == pytest.approx([0, math.log(2), math.log(51)])
    found.sum().backward()
    assert errors.grad.tolist() == pytest.approx([100, 50, 1 / 0.51])


def test_the_norm_of_a_token_that_is_zero_has_a_zero_gradient() -> None:
    tokens = torch.zeros(2, 2, 3)
    tokens[0, 0] = torch.tensor([0.0, 3.0, 4.0])
    tokens.requires_grad_()
    norm = token_norm(tokens, torch.ones(2, 2, dtype=torch.bool))
    norm.backward()
    assert norm.item() == pytest.approx(5 / 4, abs=1e-5)
    assert torch.allclose(tokens.grad[0, 0], torch.tensor([0.0, 0.6, 0.8]) / 4)
    assert torch.equal(tokens.grad[0, 1], torch.zeros(3)) and torch.equal(tokens.grad[1], torch.zeros(2, 3))


def test_mean_over_an_empty_mask_is_zero() -> None:
    assert float(masked_mean(torch.tensor([[1.0, float("inf")]]), torch.tensor([[False, False]]))) == 0


def test_hits_at_k_with_fewer_candidates_than_k() -> None:
    eye = torch.eye(3, dtype=torch.bool)
    first, fifth = hits_at(torch.eye(3), eye, (1, 5))
    assert first.all() and fifth.all()
    first, fifth = hits_at(torch.tensor(np.roll(np.eye(3), 1, axis=0)), eye, (1, 5))
    assert not first.any() and fifth.all()
