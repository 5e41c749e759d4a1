"""Codes and partners made with labels: planted factors are found in faint directions, matches have a slow twin."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from base_and_mlp import train_base_and_mlp

from benchmarks.with_labels import WithLabelsConfig, discriminants, level_posteriors, match_scores, with_labels
from tvl_align.config import parse
from tvl_align.evaluation.oracle import expected_hits, oracle
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.system.console import UserError


def test_the_documented_command_is_parsed() -> None:
    assert parse(WithLabelsConfig, ["demo/runs/base"]) == WithLabelsConfig(Path("demo/runs/base"))


def planted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, 20) noise of variance 25 in all directions but three, which tell two factors faintly."""
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, 2, (rows,), generator=draw), torch.randint(0, 3, (rows,), generator=draw)
    read = 5 * torch.randn(rows, 20, generator=draw)
    read[:, 3] = 0.3 * (2 * one - 1) + 0.05 * torch.randn(rows, generator=draw) + 7
    read[:, 4:6] = 0.2 * torch.eye(3)[other][:, :2] + 0.02 * torch.randn(rows, 2, generator=draw)
    return read, one, other


def test_factors_are_found_in_faint_directions_and_unknown_labels_are_left_out() -> None:
    read, one, other = planted(2000, 0)
    other[:500] = -1
    of = discriminants(read, [one, other], units=12, levels=3)
    fresh, one, other = planted(1000, 1)
    codes = of(fresh)
    assert codes.shape == (1000, 3)  # one direction of two levels, two of three
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    agreement = ((codes > 0) == (one == 1)[:, None]).float().mean(0)  # of each unit; the sign is free
    assert max(agreement.max(), 1 - agreement.min()) > 0.99
    distinct = {tuple(row) for level in range(3) for row in codes[other == level].mode(0).values[None].tolist()}
    assert len(distinct) == 3


def test_the_strongest_directions_fill_the_size_of_the_code() -> None:
    read, one, other = planted(2000, 0)
    read[:, 4:6] += 2 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(2))  # hides the second factor
    codes = discriminants(read, [other, one], units=1, levels=3)(read)
    assert codes.shape == (2000, 1)
    assert abs(float(((codes[:, 0] > 0) == (one == 1)).float().mean()) - 0.5) > 0.49


def test_a_row_that_does_not_name_its_level_may_have_any() -> None:
    frequency = torch.tensor([0.7, 0.3])
    certain = torch.tensor([[0.0, 90.0, 0.0], [0.0, 0.0, 90.0]])  # level 1; not named
    torch.testing.assert_close(level_posteriors(certain, frequency), torch.stack([torch.tensor([0.0, 1.0]), frequency]))
    torch.testing.assert_close(level_posteriors(certain[:, :2], frequency)[1], torch.tensor([0.5, 0.5]))


def test_rows_match_by_the_likelihood_of_equal_levels() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(6, 4, generator=draw).softmax(1) for _ in range(2))
    frequency = torch.tensor([0.1, 0.2, 0.3, 0.4])
    scores = match_scores([a, a[:, :3]], [b, b[:, 1:]], [frequency, torch.full((3,), 1 / 3)])
    for i in range(6):
        for j in range(6):
            one = sum(float(a[i, k] * b[j, k] / frequency[k]) for k in range(4))
            other = sum(float(a[i, k] * b[j, k + 1] * 3) for k in range(3))
            assert float(scores[i, j]) == pytest.approx(math.log(one) + math.log(other), abs=1e-4)


def test_certain_classifiers_find_what_the_oracle_finds() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 3, (40, 2), generator=draw) for _ in range(2))
    second[::2] = first[::2]
    own = torch.eye(40, dtype=torch.bool)
    certain = [[F.one_hot(levels[:, f], 3).float() for f in range(2)] for levels in (first, second)]
    scores = match_scores(*certain, [torch.full((3,), 1 / 3)] * 2)
    found = [50 * float(expected_hits(s, p, 1).mean()) for s, p in ((scores, own), (scores.T, own.T))]
    assert sum(found) == pytest.approx(oracle(first, second, own)[0])


def two_factors(_: Path, seed: int) -> Arrays:
    """Two modalities of 600 rows, a tenth of them for tests, that show two factors of four levels in ways of their own."""
    draw = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 4, (600, 2), generator=draw)
    shown = F.one_hot(levels, 4).flatten(1).float()
    sides = {}
    for m in ("touch", "depth"):
        noise = 0.1 * torch.randn(600, 8, generator=draw)
        sides[m] = (shown @ torch.randn(8, 8, generator=draw) + noise)[:, None]
    labels = {f: [str(int(x)) for x in levels[:, i]] for i, f in enumerate(("one", "other"))}
    return check_arrays(sides, labels=labels, owners={f: ["touch", "depth"] for f in labels}, seed=seed)


@pytest.mark.slow
def test_classifiers_find_partners_up_to_equal_levels(tmp_path: Path) -> None:
    """16 combinations of levels: 16 of 60 rows are found first, if ties are broken at random; chance is 1.7%."""
    runs = train_base_and_mlp(tmp_path, two_factors)
    content = json.loads(with_labels(WithLabelsConfig(runs / "base")).read_text())
    assert content["summary"] == {}
    (partners,) = content["partners"].values()
    assert content["partners"].keys() == {"depth_touch"}
    assert partners["acc1"] == pytest.approx(100 * 16 / 60, abs=5)
    assert partners["low"] <= partners["acc1"] <= partners["high"]


@pytest.mark.slow
def test_codes_of_a_run_hold_what_one_modality_owns(tmp_path: Path) -> None:
    runs = train_base_and_mlp(tmp_path)
    with pytest.raises(UserError, match="mlp is a run of stage2_mlp; give a run of base"):
        with_labels(WithLabelsConfig(runs / "mlp"))
    legend = tmp_path / "store" / "labels.json"
    factors = json.loads(legend.read_text())
    factors["factors"]["side"]["ownership"] = ["touch"]
    legend.write_text(json.dumps(factors))
    path = with_labels(WithLabelsConfig(runs / "base"))
    assert path == runs / "base" / "with_labels.json"
    content = json.loads(path.read_text())
    assert content["summary"].keys() == {"unique_retention"}
    assert content["partners"] == {}
    # zeros score 0; of the one unit with 3 levels the middle one tells nothing
    assert content["summary"]["unique_retention"]["score"] > 40
