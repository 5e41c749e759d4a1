"""The synthetic data: TVL format, independent factors, identical files for the same seed."""

import csv
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.stats import chi2_contingency

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.transforms import ImageLoader
from tvl_align.data.tvl import read_tvl
from tvl_align.synthetic.world import (
    FACTORS,
    TEXT_FACTORS,
    WORDS,
    Poses,
    captions,
    height_maps,
    ownership,
    render,
    sample_factors,
    sample_poses,
    synonyms,
    write_world,
)
from tvl_align.system.console import UserError

MODALITIES = ("vision", "tactile", "text")
MEANING = {word: (level, column) for level, row in WORDS.items() for column, word in enumerate(row)}


def draw(count: int, misregistration: float = 1.0, seed: int = 0) -> tuple[dict[str, np.ndarray], Poses]:
    rng = np.random.default_rng(seed)
    factors = sample_factors(count, rng)
    return factors, sample_poses(factors, misregistration, rng)


def records(folder: Path) -> list[dict[str, str]]:
    with (folder / "factors.csv").open() as file:
        return list(csv.DictReader(file))


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


def test_files_depend_on_seed_and_misregistration_and_not_on_the_number_of_workers(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", 96, 24, seed=3, workers=2, quiet=True)
    assert digest(again) == digest(world)
    other = digest(write_world(tmp_path / "other", 96, 24, seed=4, workers=1, quiet=True))
    assert other != digest(world)
    registered = write_world(tmp_path / "registered", 96, 24, seed=3, workers=1, quiet=True, misregistration=0)
    same = [a["vision"] for a, b in zip(records(registered), records(world), strict=True) if a["vision"] == b["vision"]]
    assert len(same) == 120
    files, before = digest(registered), digest(world)
    assert all(files[name] == before[name] for name in same)  # the photo does not depend on where the sensor presses
    assert sum(files[name] != before[name] for name in files if "_tac" in name or "/tactile/" in name) >= 120


@pytest.mark.parametrize("misregistration", [0.0, 0.5, 1.0])
def test_the_factors_are_written_beside_the_data(tmp_path: Path, misregistration: float) -> None:
    world = write_world(tmp_path / "world", 96, 24, seed=3, workers=1, quiet=True, misregistration=misregistration)
    rows, about = records(world), json.loads((world / "factors.json").read_text())
    assert about["synthetic"] is True
    assert about["misregistration"] == misregistration
    assert about["text_factors"] == ["texture", "coarseness", "hardness", "hue"]
    assert [*about["factors"], "named"] == [*FACTORS, "named"] == list(rows[0])[2:]
    assert {n: tuple(f["ownership"]) for n, f in about["factors"].items()} == ownership(misregistration)
    data = read_tvl(world)
    assert {r["vision"] for r in rows} == {r.vision for r in data.train + data.val + data.test}
    texts = {r.vision: r.caption for r in data.train + data.val + data.test}
    for row in rows:
        assert set(row["named"].split()) <= set(TEXT_FACTORS)
        assert {MEANING[w][0] for w in texts[row["vision"]].split(", ")} == {row[f] for f in row["named"].split()}
    assert all(row["angle"] == row["orientation"] for row in rows) == (misregistration == 0)


def test_the_files_show_the_factors_of_their_rows(tmp_path: Path) -> None:
    """The direction of the grain in the photos of ridged surfaces, in a split that is rendered in five chunks."""
    world = write_world(tmp_path / "world", 320, 10, workers=1, quiet=True)
    data = read_tvl(world)
    loader = ImageLoader(data.root, ImageOptions(64, 64))
    tvl_rows = {r.vision: r for r in data.train + data.val + data.test}
    shown, expected = [], []
    for row in records(world):
        if row["texture"] == "ridged" and row["print"] in ("none", "disc", "ring"):
            grey = loader(tvl_rows[row["vision"]], None)[0]["vision"].mean(0).numpy()
            gy, gx = np.gradient(grey)
            direction = np.degrees(np.arctan2(2 * (gx * gy).sum(), (gx**2 - gy**2).sum()) / 2)
            shown.append(int(np.rint(direction / 36)) % 5)
            expected.append(int(row["orientation"]) // 36)
    assert len(shown) >= 15
    assert np.mean(np.equal(shown, expected)) > 0.9


def test_ownership_follows_the_misregistration() -> None:
    both, vision = ("vision", "tactile"), ("vision",)
    found = [(ownership(m)["orientation"], ownership(m)["angle"]) for m in (0, 0.2, 0.21, 0.99, 1)]
    assert found == [(both, ()), (both, ()), ((), ()), ((), ()), (vision, ("tactile",))]


@pytest.mark.parametrize("misregistration", [0, 0.1, 0.5, 1])
def test_every_subset_of_modalities_owns_a_factor(misregistration: float) -> None:
    owners = {frozenset(o) for name, o in ownership(misregistration).items() if len(set(FACTORS[name].levels)) >= 5}
    assert owners >= {frozenset(c) for n in (1, 2, 3) for c in combinations(MODALITIES, n)}


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


def test_the_felt_grain_is_independent_of_the_seen_one() -> None:
    """At misregistration 1; sums over thousands of rows, so the bounds hold for any seed."""
    factors, poses = draw(20_000)
    assert (poses.felt() == factors["angle"]).all()
    assert (np.rint(poses.grain / 36) % 5 == factors["orientation"]).all()
    seen, felt = (np.rint(a / 36).astype(int) % 10 for a in (poses.grain, poses.grain + poses.turn))
    table = np.zeros((10, 10))  # modulo 360: scales have a front and a back
    np.add.at(table, (seen, felt), 1)
    assert chi2_contingency(table).pvalue > 0.001
    assert np.ptp(table) < 0.6 * 20_000 / 100
    seen_jitter = (poses.grain - 36 * factors["orientation"] + 90) % 180 - 90
    felt_jitter = (poses.grain + poses.turn - 36 * factors["angle"] + 90) % 180 - 90
    assert abs(np.corrcoef(felt_jitter, seen_jitter)[0, 1]) < 0.03
    assert felt_jitter.std() == pytest.approx(3.85, abs=0.1)
    assert np.abs(poses.shift).max() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("misregistration", [0, 0.1, 0.5])
def test_the_sensor_is_moved_and_turned_in_proportion(misregistration: float) -> None:
    factors, poses = draw(5000, misregistration)
    assert np.abs(poses.shift).max() == pytest.approx(misregistration, rel=0.02)
    assert np.abs(poses.turn).max() == pytest.approx(90 * misregistration, rel=0.02)
    assert poses.turn.mean() == pytest.approx(0, abs=3 * misregistration)
    gap = np.abs((36 * poses.felt() - poses.grain - poses.turn + 90) % 180 - 90)
    assert gap.max() <= 18 + 1e-9
    assert (poses.felt() == factors["orientation"]).all() == (misregistration <= 0.1)


@pytest.mark.parametrize("texture", range(8))
def test_registered_surfaces_are_identical(texture: int) -> None:
    factors, poses = draw(4, 0)
    seen, felt = height_maps(factors | {"texture": np.full(4, texture)}, poses, 64, np.random.default_rng(1))
    assert np.array_equal(seen, felt)


@pytest.mark.parametrize("texture", range(8))
def test_the_sensor_feels_the_same_surface(texture: int) -> None:
    """Moving the felt heights back by the known turn and shift recovers the photographed ones, where both were seen."""
    factors, poses = draw(12, 1)
    factors |= {"texture": np.full(12, texture), "profile": np.full(12, 2), "coarseness": np.full(12, 4)}
    poses = Poses(poses.grain, poses.turn, 0.5 * poses.shift)
    seen, felt = height_maps(factors, poses, 64, np.random.default_rng(1))
    axis = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(axis, axis)
    for i in range(12):
        cos, sin = np.cos(np.radians(poses.turn[i])), np.sin(np.radians(poses.turn[i]))
        dx, dy = x - poses.shift[i, 0], y - poses.shift[i, 1]
        qx, qy = dx * cos - dy * sin, dx * sin + dy * cos
        inside = (np.abs(qx) < 0.95) & (np.abs(qy) < 0.95)
        back = map_coordinates(felt[i], [(qy + 1) * 32 - 0.5, (qx + 1) * 32 - 0.5], order=1)
        assert inside.sum() > 500
        assert np.corrcoef(back[inside], seen[i][inside])[0, 1] > 0.85
        assert np.corrcoef(felt[i][inside], seen[i][inside])[0, 1] < 0.7 or abs((poses.turn[i] + 90) % 180 - 90) < 20


@pytest.mark.parametrize("misregistration", [0, 1])
def test_the_felt_grain_has_the_direction_of_the_factor(misregistration: float) -> None:
    """The direction of a ridged surface, from the phase-free structure tensor of its heights."""
    factors, poses = draw(20, misregistration)
    factors |= {"texture": np.zeros(20, int), "profile": np.full(20, 2)}
    for heights, expected in zip(
        height_maps(factors, poses, 64, np.random.default_rng(1)), (poses.grain, poses.grain + poses.turn), strict=True
    ):
        gy, gx = np.gradient(heights, axis=(1, 2))
        direction = np.degrees(np.arctan2(2 * (gx * gy).sum((1, 2)), (gx**2 - gy**2).sum((1, 2))) / 2)
        assert np.abs((direction - expected + 90) % 180 - 90).max() < 6


def test_the_profile_is_a_gain_of_the_heights() -> None:
    factors, poses = draw(5)
    factors = {name: np.full(5, levels[0]) for name, levels in factors.items()} | {"texture": np.full(5, 1)}
    poses = Poses(np.full(5, 30.0), np.full(5, 70.0), np.full((5, 2), 0.3))
    maps = []
    for profile in range(5):
        one = {name: levels[:1] for name, levels in factors.items()} | {"profile": np.array([profile])}
        maps.append(np.stack(height_maps(one, poses[:1], 64, np.random.default_rng(1))))
    for heights, gain in zip(maps, (0.3, 0.55, 1, 1.8, 3.3), strict=True):
        np.testing.assert_allclose(heights, maps[2] ** gain, atol=1e-5)


@pytest.mark.parametrize("factor", list(FACTORS))
def test_a_factor_is_visible_in_its_owners_only(factor: str) -> None:
    """Changing one factor, with the same noise and the sensor in the middle, changes its owners only."""
    base = sample_factors(6, np.random.default_rng(1))
    changed = base | {factor: (base[factor] + 1) % len(FACTORS[factor].levels)}
    if factor == "texture":  # textures with noise use more random numbers; compare two without
        base, changed = base | {factor: np.zeros(6, int)}, base | {factor: np.ones(6, int)}
    else:
        base, changed = base | {"texture": np.full(6, 2)}, changed | {"texture": np.full(6, 2)}
    poses = [sample_poses(f, 1, np.random.default_rng(2)) for f in (base, changed)]
    centred = [Poses(p.grain, p.turn, 0 * p.shift) for p in poses]
    (photo, touch), (photo2, touch2) = render(base, centred[0], 64, 5), render(changed, centred[1], 64, 5)
    owners, apart = FACTORS[factor].ownership, [np.abs(a.astype(int) - b) for a, b in ((photo, photo2), (touch, touch2))]
    assert (apart[0].mean((1, 2, 3)) > 0.2).all() == ("vision" in owners)
    assert (apart[1].mean((1, 2, 3)) > 0.2).all() == ("tactile" in owners)
    assert apart[0].max() == 0 or "vision" in owners
    assert (apart[1] > 1).mean() < 1e-3 or "tactile" in owners  # the turn of another orientation rounds differently
    texts = [captions(f, np.random.default_rng(3)) for f in (base, changed)]
    assert (texts[0] == texts[1]) == ("text" not in owners)


def test_captions_drop_words_and_mix_synonyms() -> None:
    """The counts over 5,000 captions are within 4 standard errors of their probabilities."""
    factors = sample_factors(5000, np.random.default_rng(0))
    drawn = captions(factors, np.random.default_rng(1))
    assert drawn == captions(factors, np.random.default_rng(1))
    named, columns, first = np.zeros((5000, 4), bool), [], []
    for i, (caption, names) in enumerate(drawn):
        levels = {f: FACTORS[f].levels[factors[f][i]] for f in TEXT_FACTORS}
        words = caption.split(", ")
        assert {MEANING[w][0] for w in words} == {levels[f] for f in names.split()}
        assert len(words) == len(names.split()) >= 1
        assert names.split() == [f for f in TEXT_FACTORS if f in names.split()]
        named[i] = [f in names.split() for f in TEXT_FACTORS]
        columns += [(MEANING[w][1] - factors["wording"][i]) % 5 for w in words]
        if len(words) == 4:
            first.append([levels[f] for f in TEXT_FACTORS].index(MEANING[words[0]][0]))
    assert np.abs(1 - named.mean(0) - 0.1).max() < 4 * (0.09 / 5000) ** 0.5
    assert np.abs(np.corrcoef(named.T) - np.eye(4)).max() < 0.06
    shares = np.bincount(columns, minlength=5) / len(columns)
    np.testing.assert_allclose(shares, [0.8, 0.05, 0.05, 0.05, 0.05], atol=0.013)
    np.testing.assert_allclose(np.bincount(first) / len(first), 0.25, atol=0.03)


def test_a_caption_keeps_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvl_align.synthetic.world.DROPPED", 1.0)
    drawn = captions(sample_factors(400, np.random.default_rng(0)), np.random.default_rng(1))
    assert {len(names.split()) for _, names in drawn} == {1}
    assert {names for _, names in drawn} == set(TEXT_FACTORS)


def test_words_are_unambiguous() -> None:
    words = [w for row in WORDS.values() for w in row]
    assert len(set(words)) == len(words) == 120
    assert all(name == row[0] for name, row in WORDS.items())
    assert set(WORDS) == {level for name in TEXT_FACTORS for level in FACTORS[name].levels}
    assert not any(" " in w or "," in w for w in words)
    assert all(len(others) == 4 and word not in others for word, others in synonyms().items())


def test_wrong_arguments_are_errors(tmp_path: Path, world: Path) -> None:
    with pytest.raises(UserError, match="is not empty"):
        write_world(world, 96, 24)
    with pytest.raises(UserError, match="too small"):
        write_world(tmp_path / "x", 3, 3)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"misregistration {wrong}"):
            write_world(tmp_path / "x", 96, 24, misregistration=wrong)
    assert not (tmp_path / "x").exists()
