"""Leak without labels: a planted leak is found by the probe that can, and independent tokens leak nothing."""

import pytest
import torch

from tvl_align.evaluation.cross_reading import cross_readings
from tvl_align.evaluation.scores import mean_leak, strongest
from tvl_align.evaluation.split_tokens import SplitTokens


def tokens(rows: int, seed: int, kind: str) -> SplitTokens:
    """Two modalities. "product": overlapping tokens of b are products of units of the complementary tokens of a; "faint": of
    units that are small beside the others; "linear": they are those units. Everything else is independent."""
    draw = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(rows, 2, 3, generator=draw) for name in ("ao", "bo", "ac", "bc")}
    if kind in ("product", "faint"):
        noise["bo"][:, 0, 0] = noise["ac"][:, 0, 0] * noise["ac"][:, 1, 0]
        noise["bo"] *= torch.tensor([1.0, 0.0, 0.0]) * torch.tensor([[1.0], [0.0]])
    if kind == "faint":
        noise["ac"][:, :, 0] *= 0.1
    if kind == "linear":
        noise["bo"] = noise["ac"].flip(1) + 0.1 * noise["bo"]
    present = {m: torch.ones(rows, dtype=torch.bool) for m in "ab"}
    return SplitTokens(
        {m: noise[f"{m}o"] for m in "ab"},
        {m: noise[f"{m}c"] for m in "ab"},
        {},
        present,
        torch.zeros(rows, 1, dtype=torch.int64),
        1.0,
        {},
    )


def test_a_planted_leak_is_found() -> None:
    found = cross_readings(tokens(1500, 0, "product"), tokens(500, 1, "product"), seed=0, steps=200)
    leak = found["a"]["shared from complementary"]
    assert leak["linear"] < 0.1
    assert leak["mlp"] > 0.5
    for modality, name in (
        ("b", "shared from complementary"),
        ("a", "unique from overlapping"),
        ("b", "unique from overlapping"),
    ):
        assert max(found[modality][name].values()) < 0.05
    assert mean_leak(found, "shared from complementary") == pytest.approx(
        (leak["mlp"] + max(0.0, *found["b"]["shared from complementary"].values())) / 2
    )


def test_the_interval_is_that_of_resampled_rows() -> None:
    """Every weight 1: the score itself; weights of the first half of the rows: the score of a test on these alone."""
    probe, test = tokens(800, 0, "linear"), tokens(300, 1, "linear")
    for side in (probe, test):
        side.present["a"][::3] = False
    weights = torch.stack([torch.ones(300), torch.ones(300)])
    found = cross_readings(probe, test, 0, steps=60, weights=weights)
    half = tokens(300, 1, "linear")
    half.present["a"][::3] = half.present["a"][150:] = half.present["b"][150:] = False
    of_half = cross_readings(probe, half, 0, steps=60)
    in_half = cross_readings(probe, test, 0, steps=60, weights=(torch.arange(300) < 150).float().expand(2, -1))
    for m, readings in found.items():
        for name, read in readings.items():
            assert read["low"] == pytest.approx(strongest(read), abs=1e-5) == pytest.approx(read["high"], abs=1e-5)
            kind = max(("linear", "mlp"), key=lambda k: read[k])
            assert in_half[m][name]["low"] == pytest.approx(of_half[m][name][kind], abs=1e-4)
    assert strongest({"linear": 0.1, "mlp": 0.2, "half": 0.3, "low": 0.0, "high": 0.4}) == 0.2


def test_half_is_read_from_the_first_half_of_the_rows() -> None:
    """The second half of what is read is random, which hurts only probes that are fitted on it."""
    probe, test = tokens(800, 0, "linear"), tokens(300, 1, "linear")
    probe.complementary["a"][400:] = torch.randn(400, 2, 3, generator=torch.Generator().manual_seed(2))
    read = cross_readings(probe, test, seed=0, steps=150)["a"]["shared from complementary"]
    assert read["half"] > 0.8 > 0.75 > strongest(read)


def test_a_faint_leak_is_found_too() -> None:
    found = cross_readings(tokens(1500, 0, "faint"), tokens(500, 1, "faint"), seed=0)
    assert found["a"]["shared from complementary"]["mlp"] > 0.5


def test_a_leak_below_zero_hides_no_other() -> None:
    readings = {m: {"shared from complementary": {"linear": x - 1, "mlp": x}} for m, x in (("a", -0.4), ("b", 0.4))}
    assert mean_leak(readings, "shared from complementary") == pytest.approx(0.2)


def test_two_modalities_that_no_row_has_both_are_read_from_a_third() -> None:
    """a and b in one half of the rows, a and c in the other: both are read from a, each from the rows that have it."""
    sides = [tokens(1200, 0, "linear"), tokens(400, 1, "linear")]
    for side in sides:
        half = torch.arange(len(side.present["a"])) % 2 == 0
        for group in (side.overlapping, side.complementary):
            group["c"] = group["b"].clone()
            group["b"][~half], group["c"][half] = 1e3, 1e3
        side.present["b"], side.present["c"] = half, ~half
    found = cross_readings(*sides, seed=0, steps=150)
    assert found["a"]["shared from complementary"]["linear"] > 0.8
    assert max(found["b"]["shared from complementary"].values()) < 0.05


def test_a_linear_leak_is_found_by_both_and_independent_tokens_have_none() -> None:
    found = cross_readings(tokens(800, 0, "linear"), tokens(300, 1, "linear"), seed=0, steps=150)
    assert min(found["a"]["shared from complementary"].values()) > 0.8
    none = cross_readings(tokens(800, 0, "independent"), tokens(300, 1, "independent"), seed=0, steps=60)
    assert all(score < 0.05 for entry in none.values() for scores in entry.values() for score in scores.values())


def test_nothing_is_read_of_a_code_that_is_constant() -> None:
    """Also if a single probe row differs, or all test rows are the same."""
    probe, test = tokens(300, 0, "linear"), tokens(100, 1, "linear")
    for side, differing in ((probe, 0), (test, 1)):
        side.complementary["a"] = torch.ones_like(side.complementary["a"])
        side.complementary["a"][:differing] = -1
    for swapped in ((probe, test), (test, probe)):
        found = cross_readings(*swapped, seed=0, steps=20)
        assert found["a"]["unique from overlapping"] == {"linear": 0.0, "mlp": 0.0, "half": 0.0}


def test_modalities_without_paired_rows_are_left_out() -> None:
    probe, test = tokens(100, 0, "independent"), tokens(40, 1, "independent")
    probe.present["b"][19:] = False
    found = cross_readings(probe, test, seed=0, steps=2)
    assert found.keys() == {"a"} and found["a"].keys() == {"unique from overlapping"}
    assert mean_leak(found, "shared from complementary") is None


def test_rows_of_another_modality_are_paired_by_row() -> None:
    """Absent rows are dropped on both sides alike, so that what is read belongs to the same row."""
    probe, test = tokens(1000, 0, "linear"), tokens(300, 1, "linear")
    for split in (probe, test):
        split.present["b"][::3] = False
        split.overlapping["b"][::3] = 1e3
    found = cross_readings(probe, test, seed=0, steps=150)
    assert found["a"]["shared from complementary"]["linear"] > 0.8
