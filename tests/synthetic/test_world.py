"""The synthetic data: TVL format, independent factors, identical files for the same seed."""

import csv
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from tvl_align.data.tvl import read_tvl
from tvl_align.synthetic.world import FACTORS, WORDS, caption, render, sample_factors, synonyms, write_world
from tvl_align.system.console import UserError


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_tvl_readers_read_the_world(world: Path) -> None:
    data = read_tvl(world, use_not_contact=True)
    assert len([r for r in data.train if r.contact]) + len(data.val) == 96
    assert len(data.test) == 24
    assert {r.dataset for r in data.test} == {"ssvtp", "hct"}
    assert not data.dropped
    assert any(not r.contact for r in data.train)


def test_the_smallest_world_is_read(tmp_path: Path) -> None:
    """Its 2 not-in-contact rows are all in one sub-folder of HCT."""
    data = read_tvl(write_world(tmp_path / "world", 20, 10, quiet=True), use_not_contact=True)
    assert len([r for r in data.train if r.contact]) + len(data.val) == 20
    assert len(data.test) == 10
    assert not data.dropped


def test_files_depend_on_the_seed_and_not_on_the_number_of_workers(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", 96, 24, seed=3, workers=2, quiet=True)
    assert digest(again) == digest(world)
    other = write_world(tmp_path / "other", 96, 24, seed=4, workers=1, quiet=True)
    assert digest(other) != digest(world)


def test_the_factors_are_written_beside_the_data(world: Path) -> None:
    with (world / "factors.csv").open() as file:
        rows = list(csv.DictReader(file))
    about = json.loads((world / "factors.json").read_text())
    assert about["synthetic"] is True
    assert list(about["factors"]) == list(FACTORS) == list(rows[0])[2:]
    data = read_tvl(world)
    assert {r["vision"] for r in rows} == {r.vision for r in data.train + data.val + data.test}
    captions = {r.vision: r.caption for r in data.train + data.val + data.test}
    for row in rows:
        levels = [FACTORS[f].levels.index(row[f]) for f in ("texture", "coarseness", "wording")]
        assert captions[row["vision"]] == caption(*levels)


def test_factors_cover_every_ownership() -> None:
    assert len(FACTORS) >= 10
    assert all(len(set(f.levels)) >= 5 for f in FACTORS.values())
    owners = {f.ownership for f in FACTORS.values()}
    assert owners >= {("vision", "tactile", "text"), ("vision", "tactile"), ("vision",), ("tactile",), ("text",)}


def test_factors_are_independent() -> None:
    """Chi-squared test of every pair of factors on 50,000 samples, with Bonferroni correction."""
    drawn = sample_factors(50_000, np.random.default_rng(0))
    pairs = list(combinations(drawn, 2))
    for a, b in pairs:
        table = np.zeros((len(FACTORS[a].levels), len(FACTORS[b].levels)))
        np.add.at(table, (drawn[a], drawn[b]), 1)
        assert chi2_contingency(table).pvalue > 0.001 / len(pairs), (a, b)
    for name, levels in drawn.items():
        assert np.ptp(np.bincount(levels)) < 0.12 * 50_000 / len(FACTORS[name].levels), name


@pytest.mark.parametrize("factor", list(FACTORS))
def test_a_factor_is_visible_in_its_owners_only(factor: str) -> None:
    """Changing one factor, with the same noise, changes the images and captions of its owners only."""
    base = sample_factors(6, np.random.default_rng(1))
    changed = base | {factor: (base[factor] + 1) % len(FACTORS[factor].levels)}
    if factor == "texture":  # textures with noise use more random numbers; compare two without
        base, changed = base | {factor: np.zeros(6, int)}, base | {factor: np.ones(6, int)}
    else:
        base, changed = base | {"texture": np.full(6, 2)}, changed | {"texture": np.full(6, 2)}
    (photo, touch), (photo2, touch2) = render(base, 64, 5), render(changed, 64, 5)
    owners = FACTORS[factor].ownership
    assert (np.abs(photo.astype(int) - photo2).mean((1, 2, 3)) > 0.2).all() == ("vision" in owners)
    assert np.array_equal(photo, photo2) == ("vision" not in owners)
    assert np.array_equal(touch, touch2) == ("tactile" not in owners)
    texts = [[caption(*t) for t in zip(d["texture"], d["coarseness"], d["wording"], strict=True)] for d in (base, changed)]
    assert (texts[0] == texts[1]) == ("text" not in owners)


def test_words_are_unambiguous() -> None:
    words = [w for row in WORDS.values() for w in row]
    assert len(set(words)) == len(words) == 65
    assert all(name == row[0] for name, row in WORDS.items())
    assert all(len(others) == 4 and word not in others for word, others in synonyms().items())


def test_wrong_arguments_are_errors(tmp_path: Path, world: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        write_world(world, 96, 24)
    with pytest.raises(UserError, match="too small"):
        write_world(tmp_path / "x", 3, 3)
