"""Probes find the information that features contain and no other; label files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tvl_align.evaluation.labels import read_labels
from tvl_align.evaluation.probes import attentive_probe, linear_probe, normalised_score, probe_all
from tvl_align.system.console import UserError


def labelled(rows: int, seed: int, signal: float) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, size=rows)
    centres = np.random.default_rng(7).standard_normal((5, 20))
    return torch.tensor(signal * centres[labels] + rng.standard_normal((rows, 20))).float(), labels


def test_constant_features_do_not_change_a_probe() -> None:
    """Neither zeros, with standard deviation 0, nor a constant whose standard deviation is a rounding error."""
    (x, y), (x_test, y_test) = labelled(300, 0, 1.0), labelled(200, 1, 1.0)
    constant = torch.tensor([0.0, 0.1, 1000.1])
    more, more_test = (torch.cat([part, constant.expand(len(part), 3)], dim=1) for part in (x, x_test))
    assert linear_probe(more, y, more_test, y_test) == pytest.approx(linear_probe(x, y, x_test, y_test), abs=1.0)


@pytest.mark.parametrize(
    ("where", "value"),
    [("train", torch.nan), ("train", torch.inf), ("train", 1e30), ("test", torch.nan), ("test", torch.inf)],
)
def test_features_that_are_not_finite_are_refused(where: str, value: float) -> None:
    (x, y), (x_test, y_test) = labelled(60, 0, 1.0), labelled(40, 1, 1.0)
    (x if where == "train" else x_test)[3, 7] = value
    with pytest.raises(UserError, match="NaN, inf"):
        list(probe_all(linear_probe, [(x, y, x_test, y_test)]))


def test_linear_probe_finds_signal_and_not_noise() -> None:
    for signal, low, high in ((2.0, 95, 100), (0.0, 10, 32)):
        (x, y), (x_test, y_test) = labelled(400, 0, signal), labelled(200, 1, signal)
        score = linear_probe(x, y, x_test, y_test)
        assert low <= score <= high
        assert list(probe_all(linear_probe, [(x, y, x_test, y_test)] * 2)) == [score, score]


def test_attentive_probe_finds_a_factor_in_one_token_of_many() -> None:
    """The factor is in one of 8 tokens, indicated by a marker; a linear probe of the mean token cannot find it."""

    def synthetic(rows: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        rng = np.random.default_rng(seed)
        labels, position = rng.integers(4, size=rows), rng.integers(8, size=rows)
        tokens = 0.3 * rng.standard_normal((rows, 8, 16))
        for i in range(rows):
            tokens[i, :, :4] = np.eye(4)[rng.integers(4, size=8)] * 2  # decoys everywhere
            tokens[i, position[i], :4] = np.eye(4)[labels[i]] * 2
            tokens[i, position[i], 4:8] = 3.0
        return torch.tensor(tokens).float(), labels

    (x, y), (x_test, y_test) = synthetic(1500, 0), synthetic(300, 1)
    masks = [torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, x_test)]
    runs = list(probe_all(attentive_probe, [(x, masks[0], [y], x_test, masks[1], [y_test])] * 2, seed=1))
    assert runs[0] == runs[1]
    assert runs[0][0] > 90
    assert linear_probe(x.mean(1), y, x_test.mean(1), y_test) < 75


def test_normalised_score() -> None:
    assert normalised_score(20, 20, 80) == 0
    assert normalised_score(80, 20, 80) == 100
    assert np.isnan(normalised_score(50, 50, 50))


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
