"""Retrieval equals the reference implementation; ties; values that are not finite."""

from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tvl_align.metrics.retrieval import retrieval, tvl_protocol


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 999), st.integers(0, 3), st.integers(1, 12))
def test_retrieval_equals_the_reference(rows: int, seed: int, columns: int, chunk: int) -> None:
    x, y = unit(rows, seed), unit(rows, seed + 1)
    keys = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(seed)) if columns else None
    found = retrieval(x, y, torch.ones(rows, dtype=torch.bool), keys, 20.0, chunk)
    positives = np.eye(rows, dtype=bool) if keys is None else (keys[:, None] == keys[None]).any(2).numpy()
    a, b = x.numpy(), y.numpy()
    for k, accuracy in ((1, found.acc1), (5, found.acc5)):
        expected = (reference.accuracy(a, b, positives, k) + reference.accuracy(b, a, positives.T, k)) / 2
        assert accuracy == pytest.approx(expected)
    assert found.chance1 == pytest.approx(100 * positives.mean())
    everyone = np.ones(rows, dtype=bool)
    losses = (reference.info_nce(u, v, 20.0, positives, everyone) for u, v in ((a, b), (b, a)))
    assert found.loss == pytest.approx(sum(losses) / 2 / rows, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scale", [100.0, 400.0])
def test_loss_at_large_scales(scale: float) -> None:
    """Includes rows with scores so low that a sum of exp(score - shift) underflows."""
    x, y = unit(30, 0), unit(30, 1)
    x[:3], y[:3] = torch.eye(6)[0], -torch.eye(6)[0]  # opposite to their partners
    x[3:], y[3:] = (F.normalize(part[3:].abs() * torch.tensor([1e-3, 1, 1, 1, 1, 1]), dim=-1) for part in (x, y))
    y[3:, 0] = -4.0
    y[3:] = F.normalize(y[3:], dim=-1)
    found = retrieval(x, y, torch.ones(30, dtype=torch.bool), None, scale)
    scores = scale * x.double() @ y.double().T
    expected = sum(F.cross_entropy(s, torch.arange(30)) for s in (scores, scores.T)) / 2
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_the_result_does_not_depend_on_the_chunk() -> None:
    x, y, everyone = unit(50, 0), unit(50, 0) + 0.3 * unit(50, 1), torch.ones(50, dtype=torch.bool)
    y = F.normalize(y, dim=-1)
    whole, parts = (retrieval(x, y, everyone, None, 20.0, chunk) for chunk in (1000, 7))
    assert whole.acc1 == parts.acc1 > 50
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)


def test_constant_features_score_zero() -> None:
    x = torch.ones(10, 4) / 2
    found = retrieval(x, x, torch.ones(10, dtype=torch.bool))
    assert (found.acc1, found.acc5) == (0, 0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("captions", [False, True])
def test_a_duplicate_of_the_positive_is_ranked_first(two_threads: None, captions: bool) -> None:
    """Even though block shapes and threads change the rounding. Duplicates with the same caption are positives."""
    x = F.normalize(torch.randn(97, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = F.normalize(x + 0.1 * torch.randn(97, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    twice, keys = torch.ones(194, dtype=torch.bool), torch.arange(97).repeat(2)[:, None]
    for chunk in (10, 100):
        found = retrieval(x.repeat(2, 1), y.repeat(2, 1), twice, keys if captions else None, chunk=chunk)
        assert (found.acc1, found.acc5) == (100 if captions else 0, 100)
        assert retrieval(x, y, twice[:97], chunk=chunk).acc1 == 100


def test_scores_that_are_not_finite_are_misses() -> None:
    x, y = unit(20, 0), unit(20, 0)
    x[3] = torch.nan
    found = retrieval(x, y, torch.ones(20, dtype=torch.bool))
    assert found.acc1 < 50
    assert np.isnan(found.loss)


def test_absent_rows_are_no_candidates_and_no_rows_give_nan() -> None:
    x, y = unit(6, 0), unit(6, 0)
    valid = torch.tensor([True, False, True, True, False, True])
    found = retrieval(x, y, valid)
    assert (found.gallery, found.acc1, found.chance1) == (4, 100, 25)
    assert np.isnan(retrieval(x, y, torch.zeros(6, dtype=torch.bool)).acc1)


def test_fewer_than_five_candidates() -> None:
    assert retrieval(unit(3, 0), unit(3, 1), torch.ones(3, dtype=torch.bool)).acc5 == 100


def test_the_tvl_protocol_equals_its_definition() -> None:
    x, y, text = unit(20, 0), unit(20, 1), unit(20, 2)
    for threshold in (0.2, 0.6):
        for k in (1, 5, 50):
            hits = []
            for a, b in ((x, y), (y, x)):
                for i in range(20):
                    order = sorted(range(20), key=lambda j: -float(a[i] @ b[j]))[:k]
                    hits.append(any(float(text[i] @ text[j]) > threshold for j in order))
            assert tvl_protocol(x, y, text, threshold, k, chunk=7) == pytest.approx(100 * np.mean(hits))


def test_nan_is_never_a_hit() -> None:
    x = torch.full((6, 4), torch.nan)
    y = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    for keys in (None, torch.arange(6)[:, None]):
        assert retrieval(x, y, torch.ones(6, dtype=torch.bool), keys).acc5 == 0
