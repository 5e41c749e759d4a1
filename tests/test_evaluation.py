"""Retrieval against its twin; probes that find what is there and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tvl_align.console import UserError
from tvl_align.evaluation import attentive_probe, linear_probe, probe_all, read_labels, retrieval, tvl_protocol, way


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 999), st.integers(0, 3), st.integers(1, 12))
def test_retrieval_equals_its_twin(rows: int, seed: int, columns: int, chunk: int) -> None:
    x, y = unit(rows, seed), unit(rows, seed + 1)
    keys = torch.randint(4, (rows, columns), generator=torch.Generator().manual_seed(seed)) if columns else None
    found = retrieval(x, y, torch.ones(rows, dtype=torch.bool), keys, 20.0, chunk)
    positives = np.eye(rows, dtype=bool) if keys is None else (keys[:, None] == keys[None]).any(2).numpy()
    a, b = x.numpy(), y.numpy()
    for k, ours in ((1, found.acc1), (5, found.acc5)):
        expected = (reference.accuracy(a, b, positives, k) + reference.accuracy(b, a, positives.T, k)) / 2
        assert ours == pytest.approx(expected)
    assert found.chance1 == pytest.approx(100 * positives.mean())
    everyone = np.ones(rows, dtype=bool)
    losses = (reference.info_nce(u, v, 20.0, positives, everyone) for u, v in ((a, b), (b, a)))
    assert found.loss == pytest.approx(sum(losses) / 2 / rows, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("scale", [100.0, 400.0])
def test_losses_of_any_scale(scale: float) -> None:
    """Also of rows whose best score is so low that a sum of exp() around the highest possible one underflows."""
    x, y = unit(30, 0), unit(30, 1)
    x[:3], y[:3] = torch.eye(6)[0], -torch.eye(6)[0]  # opposite to their partners
    x[3:], y[3:] = (F.normalize(part[3:].abs() * torch.tensor([1e-3, 1, 1, 1, 1, 1]), dim=-1) for part in (x, y))
    y[3:, 0] = -4.0
    y[3:] = F.normalize(y[3:], dim=-1)
    found = retrieval(x, y, torch.ones(30, dtype=torch.bool), None, scale)
    scores = scale * x.double() @ y.double().T
    expected = sum(F.cross_entropy(s, torch.arange(30)) for s in (scores, scores.T)) / 2
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_the_chunk_changes_nothing() -> None:
    """Trap 4: accuracy belongs to the gallery, not to a batch."""
    x, y, everyone = unit(50, 0), unit(50, 0) + 0.3 * unit(50, 1), torch.ones(50, dtype=torch.bool)
    y = F.normalize(y, dim=-1)
    whole, parts = (retrieval(x, y, everyone, None, 20.0, chunk) for chunk in (1000, 7))
    assert whole.acc1 == parts.acc1 > 50
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)


def test_constant_features_do_not_look_good() -> None:
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
def test_a_copy_of_the_partner_is_before_it(two_threads: None, captions: bool) -> None:
    """Though products of blocks of other shapes, on other threads, are rounded another way. A caption's copies are right."""
    x = F.normalize(torch.randn(97, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = F.normalize(x + 0.1 * torch.randn(97, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    twice, keys = torch.ones(194, dtype=torch.bool), torch.arange(97).repeat(2)[:, None]
    for chunk in (10, 100):
        found = retrieval(x.repeat(2, 1), y.repeat(2, 1), twice, keys if captions else None, chunk=chunk)
        assert (found.acc1, found.acc5) == (100 if captions else 0, 100)
        assert retrieval(x, y, twice[:97], chunk=chunk).acc1 == 100


def test_numbers_that_are_not_finite_count_against_us() -> None:
    x, y = unit(20, 0), unit(20, 0)
    x[3] = torch.nan
    found = retrieval(x, y, torch.ones(20, dtype=torch.bool))
    assert found.acc1 < 50
    assert np.isnan(found.loss)


def test_absent_rows_are_not_in_the_gallery_and_an_empty_one_is_nan() -> None:
    x, y = unit(6, 0), unit(6, 0)
    valid = torch.tensor([True, False, True, True, False, True])
    found = retrieval(x, y, valid)
    assert (found.gallery, found.acc1, found.chance1) == (4, 100, 25)
    assert np.isnan(retrieval(x, y, torch.zeros(6, dtype=torch.bool)).acc1)


def test_fewer_than_five_candidates() -> None:
    assert retrieval(unit(3, 0), unit(3, 1), torch.ones(3, dtype=torch.bool)).acc5 == 100


def test_the_protocol_of_tvl_equals_its_twin() -> None:
    x, y, text = unit(20, 0), unit(20, 1), unit(20, 2)
    for threshold in (0.2, 0.6):
        for k in (1, 5, 50):
            hits = []
            for a, b in ((x, y), (y, x)):
                for i in range(20):
                    order = sorted(range(20), key=lambda j: -float(a[i] @ b[j]))[:k]
                    hits.append(any(float(text[i] @ text[j]) > threshold for j in order))
            assert tvl_protocol(x, y, text, threshold, k, chunk=7) == pytest.approx(100 * np.mean(hits))


def labelled(rows: int, seed: int, signal: float) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=rows)
    centres = np.random.default_rng(7).standard_normal((5, 20))
    return torch.tensor(signal * centres[labels] + rng.standard_normal((rows, 20))).float(), labels


def test_a_constant_feature_tells_a_probe_nothing() -> None:
    """Neither exact zeros, whose spread is zero, nor a value whose spread is rounding."""
    (x, y), (x_test, y_test) = labelled(300, 0, 1.0), labelled(200, 1, 1.0)
    constant = torch.tensor([0.0, 0.1, 1000.1])
    more, more_test = (torch.cat([part, constant.expand(len(part), 3)], dim=1) for part in (x, x_test))
    assert linear_probe(more, y, more_test, y_test) == pytest.approx(linear_probe(x, y, x_test, y_test), abs=1.0)


@pytest.mark.parametrize(
    ("where", "value"),
    [("train", torch.nan), ("train", torch.inf), ("train", 1e30), ("test", torch.nan), ("test", torch.inf)],
)
def test_a_probe_refuses_features_that_are_not_finite(where: str, value: float) -> None:
    (x, y), (x_test, y_test) = labelled(60, 0, 1.0), labelled(40, 1, 1.0)
    (x if where == "train" else x_test)[3, 7] = value
    with pytest.raises(UserError, match="NaN, inf"):
        list(probe_all(linear_probe, [(x, y, x_test, y_test)]))


def test_nan_is_never_a_hit() -> None:
    x = torch.full((6, 4), torch.nan)
    y = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    for keys in (None, torch.arange(6)[:, None]):
        assert retrieval(x, y, torch.ones(6, dtype=torch.bool), keys).acc5 == 0


def test_linear_probe_reads_signal_and_not_noise() -> None:
    for signal, low, high in ((2.0, 95, 100), (0.0, 10, 32)):
        (x, y), (x_test, y_test) = labelled(400, 0, signal), labelled(200, 1, signal)
        score = linear_probe(x, y, x_test, y_test)
        assert low <= score <= high
        assert list(probe_all(linear_probe, [(x, y, x_test, y_test)] * 2)) == [score, score]


def test_attentive_probe_finds_what_is_in_one_token_of_many() -> None:
    """The factor sits in one of two places, told by a marker: no linear map of the mean can read it well."""

    def made(rows: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels, place = rng.integers(4, size=rows), rng.integers(8, size=rows)
        tokens = 0.3 * rng.standard_normal((rows, 8, 16))
        for i in range(rows):
            tokens[i, :, :4] = np.eye(4)[rng.integers(4, size=8)] * 2  # decoys everywhere
            tokens[i, place[i], :4] = np.eye(4)[labels[i]] * 2
            tokens[i, place[i], 4:8] = 3.0
        return torch.tensor(tokens).float(), labels

    (x, y), (x_test, y_test) = made(1500, 0), made(300, 1)
    masks = [torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, x_test)]
    runs = list(probe_all(attentive_probe, [(x, masks[0], [y], x_test, masks[1], [y_test])] * 2, seed=1))
    assert runs[0] == runs[1]
    assert runs[0][0] > 90
    assert linear_probe(x.mean(1), y, x_test.mean(1), y_test) < 75


def test_way() -> None:
    assert way(20, 20, 80) == 0
    assert way(80, 20, 80) == 100
    assert np.isnan(way(50, 50, 50))


def test_labels_from_a_file(world: Path, tmp_path: Path) -> None:
    labels = read_labels(world / "factors.csv")
    assert labels.ownership["hue"] == ("vision",)
    name = next(iter(labels.values))
    assert labels.of("hue", [name, "nowhere"]).tolist()[1] == -1
    own = tmp_path / "mine.csv"
    own.write_text("vision,material\na.jpg,wood\nb.jpg,\n")
    mine = read_labels(own)
    assert mine.levels == {"material": ["wood"]}
    assert mine.of("material", ["a.jpg", "b.jpg"]).tolist() == [0, -1]
    assert mine.ownership == {"material": ()}
    own.write_text("photo,material\n")
    with pytest.raises(UserError, match="needs a vision column"):
        read_labels(own)
    with pytest.raises(UserError, match="no such label file"):
        read_labels(tmp_path / "none.csv")
