"""Retention and leak of factors: what counts as which, by which probe, and what is left out; readings of planted tokens."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tvl_align.contract import Features, Tokens
from tvl_align.evaluation.factors import Factor, FactorProbes, Group, Reading, Rows
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.probes import ProbeKind

TEST = 100


def reading(accuracy: float, bits: float = 0.0) -> Reading:
    """A reading of 100 test rows with the given accuracy in percent."""
    return Reading(torch.where(torch.arange(TEST) < accuracy, 1.0, 0.0), torch.full((TEST,), bits))


def factor(owners: tuple[str, ...], ceiling: float, **groups: tuple[float, float]) -> Factor:
    """A factor with chance 20. groups: (accuracy of linear, of mlp); bits: a hundredth of it, minus 0.2."""
    made = Factor(
        owners, 20.0, 2.0, TEST, {"stage1": {"attentive": reading(22, 0.1), "mlp on tokens": reading(ceiling, 1.6)}}
    )
    for group, (linear, mlp) in groups.items():
        made.readings[group] = {"linear": reading(linear, linear / 100 - 0.2), "mlp": reading(mlp, mlp / 100 - 0.2)}
    return made


def probes_of(factors: dict[str, dict[str, Factor]]) -> FactorProbes:
    made = FactorProbes.__new__(FactorProbes)
    made.factors, made.left_out = factors, {}
    return made


def hand_made() -> FactorProbes:
    """hue is shared and read from the overlapping tokens, shape is unique and read from the complementary ones."""
    hue = factor(("vision", "tactile"), 80, overlapping=(50, 71), complementary=(26, 20), half_overlapping=(44, 20))
    wood = factor(("vision", "tactile"), 24, overlapping=(90, 90), complementary=(90, 90), half_overlapping=(90, 90))
    shape = factor(("tactile",), 100, overlapping=(20, 28), complementary=(60, 40))
    mystery = factor((), 80, overlapping=(80, 80), complementary=(80, 80))
    return probes_of({"vision": {"hue": hue, "wood": wood}, "tactile": {"shape": shape, "mystery": mystery}})


def test_retention_and_leak_worked_out_by_hand() -> None:
    """wood has a ceiling at chance and mystery no owner: neither is in a score."""
    found = hand_made().summary(torch.ones(10, TEST))
    scores = {name: entry["score"] for name, entry in found.items()}
    expected = {"shared_retention": 85.0, "unique_retention": 50.0, "shared_leak": 10.0, "unique_leak": 10.0}
    assert scores == pytest.approx(expected, abs=1e-4)
    assert {name: entry["linear"] for name, entry in found.items()} == pytest.approx(
        {"shared_retention": 50.0, "unique_retention": 50.0, "shared_leak": 10.0, "unique_leak": 0.0}, abs=1e-4
    )
    bits = {"shared_retention": 51 / 1.6, "unique_retention": 40 / 1.6, "shared_leak": 6 / 1.6, "unique_leak": 8 / 1.6}
    assert {name: entry["bits"] for name, entry in found.items()} == pytest.approx(bits, abs=1e-4)
    assert found["shared_retention"]["half"] == pytest.approx(40)
    assert "half" not in found["unique_retention"]
    for number in ("score", "linear", "half", "bits"):
        prefix = "" if number == "score" else f"{number}_"
        ends = [found["shared_retention"][f"{prefix}{end}"] for end in ("low", "high")]
        assert ends == pytest.approx([found["shared_retention"][number]] * 2, abs=1e-3)


def test_a_leak_below_chance_hides_no_other() -> None:
    low, high = (factor(("tactile",), 100, overlapping=(x, 5), complementary=(60, 60)) for x in (4, 36))
    found = probes_of({"tactile": {"shape": low, "print": high}}).summary(torch.ones(4, TEST))["unique_leak"]
    assert found["score"] == found["linear"] == pytest.approx(10)  # of -19 and 20
    assert [found["low"], found["high"]] == pytest.approx([10, 10], abs=1e-3)


def test_a_leak_lies_within_its_interval() -> None:
    """Also at 0, where resampled leaks can only be above."""
    draw = torch.Generator().manual_seed(0)
    made = [factor(("tactile",), 100, overlapping=(19, 5), complementary=(60, 60)) for _ in range(8)]
    weights = torch.poisson(torch.ones(200, TEST), generator=draw)
    found = probes_of({"tactile": {f"f{i}": f for i, f in enumerate(made)}}).summary(weights)["unique_leak"]
    assert found["low"] == found["score"] == 0 < found["high"]


def test_every_number_goes_into_json() -> None:
    made = hand_made()
    text = json.dumps({"factors": made.as_json(), "summary": made.summary(torch.ones(4, TEST))}, allow_nan=False)
    wood = json.loads(text)["factors"]["vision"]["wood"]
    assert not wood["readable"] and wood["score"] == {}
    assert wood["accuracy"]["stage1"] == pytest.approx({"attentive": 22, "mlp on tokens": 24})


def test_no_readable_factor_gives_no_score() -> None:
    wood = factor(("vision", "tactile"), 24, overlapping=(90, 90), complementary=(90, 90))
    wood.readings["stage1"] = {"mlp on tokens": reading(24)}
    made = probes_of({"vision": {"wood": wood}})
    assert made.summary(torch.ones(4, TEST)) == {}
    assert made.shared_scores("overlapping", torch.ones(4, TEST)) == {}


@pytest.mark.parametrize(
    ("chance", "rows", "ceiling", "readable"),
    [(50, 10_000, 56, True), (50, 10_000, 54, False), (50, 25, 69, False), (50, 25, 71, True), (100, 25, 100, False)],
)
def test_a_ceiling_is_above_chance_by_five_points_and_two_errors(
    chance: float, rows: int, ceiling: float, readable: bool
) -> None:
    made = Factor((), chance, 1.0, rows, {"stage1": {"linear on tokens": reading(ceiling)}})
    assert made.readable == readable


def test_the_interval_resamples_read_and_ceiling_together() -> None:
    """Where the same rows are right, the score does not depend on which of them are drawn."""
    made = factor((), 80, overlapping=(80, 20))
    weights = torch.zeros(3, TEST)
    weights[0, 40:], weights[1, :90], weights[2] = 1, 1, 1
    assert made.resampled("overlapping", weights).samples.tolist() == pytest.approx([100] * 3, abs=1e-3)
    half = factor((), 100, overlapping=(60, 20))
    found = half.resampled("overlapping", weights)
    assert found.value == pytest.approx(50)
    assert found.samples.tolist() == pytest.approx([16.667, 58.333, 50], abs=1e-2)
    assert half.resampled("overlapping", weights, "mlp", 0.0).samples.tolist() == pytest.approx([0, 2.778, 0], abs=1e-2)


def test_bits_of_both_are_resampled_together() -> None:
    """Each by the probe with most bits, which need not be the most accurate one."""
    made = factor((), 80, overlapping=(80, 20))
    tells = torch.where(torch.arange(TEST) < 50, 2.0, 0.4)
    made.readings["overlapping"]["mlp"] = Reading(torch.zeros(TEST), tells)
    made.readings["stage1"]["mlp on tokens"] = Reading(torch.zeros(TEST), 1.5 * tells)
    weights = (torch.arange(TEST) < torch.tensor([[TEST], [50], [75]])).float()
    assert made.resampled_bits("overlapping", weights).samples.tolist() == pytest.approx([66.667] * 3, abs=1e-2)
    made.readings["stage1"]["mlp on tokens"] = Reading(torch.zeros(TEST), torch.full((TEST,), 4.0))
    found = made.resampled_bits("overlapping", weights)
    assert found.value == pytest.approx(30)
    assert found.samples.tolist() == pytest.approx([30, 50, 100 * (2 * 50 + 0.4 * 25) / 75 / 4], abs=1e-2)


def test_rows_without_the_factor_do_not_count() -> None:
    correct = torch.tensor([1.0, 0.0, torch.nan, 1.0])
    read = Reading(correct, 2 * correct)
    assert read.accuracy == pytest.approx(200 / 3)
    assert read.bits == pytest.approx(4 / 3)


def planted(rows: int, seed: int, levels: int = 4) -> tuple[Rows, dict[str, np.ndarray], dict[str, Tensor]]:
    """Rows of one modality with a factor, a number and a control, and tokens (rows, 2, 5) that tell the first two."""
    draw = torch.Generator().manual_seed(seed)
    level = torch.randint(levels, (rows,), generator=draw)
    number = torch.randn(rows, generator=draw)
    tokens = 0.02 * torch.randn(rows, 2, 5, generator=draw)
    tokens[:, 0, :levels] += 3 * torch.eye(levels)[level]
    tokens[:, 1, 4] += number
    present = torch.ones(rows, dtype=torch.bool)
    features = Tokens(tokens, torch.ones(rows, 2, dtype=torch.bool), tokens.flatten(1).clone(), present)
    names = [f"{seed}-{i}" for i in range(rows)]
    frozen = Features({"touch": features}, torch.zeros(rows, 1, dtype=torch.int64), torch.arange(rows))
    values = {"shape": level.numpy(), "force": number.numpy(), "noise": torch.randint(2, (rows,), generator=draw).numpy()}
    groups = {"overlapping": tokens, "complementary": torch.ones_like(tokens)}
    return Rows(names, frozen), values, groups


def labelled(*sides: tuple[Rows, dict[str, np.ndarray], dict[str, Tensor]]) -> Labels:
    values: dict[str, dict[str, int]] = {}
    numbers: dict[str, float] = {}
    for rows, found, _ in sides:
        for i, name in enumerate(rows.names):
            quantile = int(np.searchsorted([-0.84, -0.25, 0.25, 0.84], found["force"][i]))
            values[name] = {"shape": int(found["shape"][i]), "force": quantile, "noise": int(found["noise"][i])}
            numbers[name] = float(found["force"][i])
    levels = {"shape": list("abcd"), "force": list("12345"), "noise": list("ab")}
    owners = {"shape": ("touch", "vision"), "force": ("touch",), "noise": ("touch",)}
    return Labels(levels, values, owners, {"force": numbers})


def fitted(
    kind: ProbeKind = "linear", steps: int = 400, test_labels_shuffled: bool = False, garbage: int = 0
) -> FactorProbes:
    probe, test = planted(500, 0), planted(300, 1)
    if garbage:
        rows, values, groups = planted(garbage, 2)
        for x in (rows.frozen.modalities["touch"].tokens, groups["overlapping"]):
            x.mul_(1e3)
        both = [torch.cat([test[2][g], groups[g]]) for g in ("overlapping", "complementary")]
        names = [*test[0].names, *rows.names]
        a, b = test[0].frozen, rows.frozen
        features = Features(
            {"touch": Tokens(*(torch.cat(pair) for pair in zip(_fields(a), _fields(b), strict=True)))},
            torch.cat([a.caption_keys, b.caption_keys]),
            torch.arange(len(names)),
        )
        merged = {k: np.concatenate([test[1][k], values[k]]) for k in values}
        test = Rows(names, features), merged, dict(zip(("overlapping", "complementary"), both, strict=True))
    labels = labelled(probe, test)
    if test_labels_shuffled:
        for i, name in enumerate(test[0].names):
            labels.values[name]["shape"] = int(test[1]["shape"][i] + 1) % 4
    made = FactorProbes(labels, probe[0], test[0], seed=0, steps=steps)
    groups = {g: Group({"touch": probe[2][g]}, {"touch": test[2][g]}) for g in ("overlapping", "complementary")}
    made.read(groups, kinds=(kind,))
    for each in made.each():
        each.readings["stage1"] = each.readings["overlapping"]
    return made


def _fields(features: Features) -> tuple[Tensor, ...]:
    t = features.modalities["touch"]
    return t.tokens, t.mask, t.pooled, t.present


@pytest.fixture(scope="module")
def plain() -> FactorProbes:
    return fitted()


@pytest.mark.parametrize(("kind", "steps"), [("linear", 400), ("mlp", 120)])
def test_bits_of_a_perfect_and_of_a_constant_representation(kind: ProbeKind, steps: int) -> None:
    """A perfect reader has the bits of the levels, one that sees nothing has none; so has a factor that is not there."""
    made = fitted(kind, steps)
    shape, noise = (made.factors["touch"][name] for name in ("shape", "noise"))
    assert shape.entropy == pytest.approx(2.0, abs=0.05)
    assert shape.readings["overlapping"][kind].bits == pytest.approx(shape.entropy, abs=0.05)
    assert shape.readings["complementary"][kind].bits == pytest.approx(0, abs=0.03)
    assert noise.readings["complementary"][kind].bits == pytest.approx(0, abs=0.03)
    assert abs(shape.readings["complementary"][kind].accuracy - 25) < 10
    assert noise.readings["overlapping"][kind].bits < 0.05
    assert not noise.readable and shape.readable
    assert shape.score("overlapping") == pytest.approx(100, abs=1)
    assert shape.bits_score("complementary") < 2


def test_numbers_are_read_as_levels_and_as_numbers(plain: FactorProbes) -> None:
    force = plain.factors["touch"]["force"]
    assert set(plain.as_json()["touch"]["force"]["r2"]) == {"stage1", "overlapping", "complementary"}
    assert plain.as_json()["touch"]["shape"]["r2"] == {}
    assert (force.readings["overlapping"]["linear"].r2 or 0) > 0.95
    assert abs(force.readings["complementary"]["linear"].r2 or 0) < 0.05


def test_labels_of_the_test_rows_have_no_part_in_the_fit(plain: FactorProbes) -> None:
    """With every test label moved on by one, a perfect reader is always wrong, and the other factors stay as they were."""
    moved = fitted(test_labels_shuffled=True)
    assert moved.factors["touch"]["shape"].readings["overlapping"]["linear"].accuracy == 0
    for name in ("force", "noise"):
        a, b = (f.factors["touch"][name].readings["overlapping"]["linear"].correct for f in (plain, moved))
        assert torch.equal(a, b)


def test_garbage_test_rows_do_not_change_the_others(plain: FactorProbes) -> None:
    more = fitted(garbage=200)
    for name in ("shape", "force", "noise"):
        for group, kinds in plain.factors["touch"][name].readings.items():
            for kind, expected in kinds.items():
                found = more.factors["touch"][name].readings[group][kind].correct[:300]
                assert (found != expected.correct).float().mean() < 0.01, (name, group, kind)


def test_ceilings_are_of_tokens_and_of_pooled_features() -> None:
    """Each by every kind of probe; padded tokens are not read."""
    probe, test = planted(300, 0), planted(100, 1)
    for rows, _, _ in (probe, test):
        rows.frozen.modalities["touch"].mask[:, 1] = False  # the token of the number
        rows.frozen.modalities["touch"].pooled.zero_()
    made = FactorProbes(labelled(probe, test), probe[0], test[0], seed=0, steps=100)
    made.read_ceilings()
    shape, force = (made.factors["touch"][name].readings["stage1"] for name in ("shape", "force"))
    kinds = {"attentive", "linear on tokens", "mlp on tokens", "linear on pooled", "mlp on pooled"}
    assert shape.keys() == kinds
    assert min(shape[kind].accuracy for kind in kinds if "pooled" not in kind) > 95
    assert max(shape[kind].accuracy for kind in kinds if "pooled" in kind) < 45
    assert max(reading.r2 or 0 for reading in force.values()) < 0.15


def test_ceilings_are_read_from_the_cache_if_nothing_they_depend_on_has_changed(tmp_path: Path) -> None:
    probe, test = planted(300, 0), planted(100, 1)

    def made(seed: int = 0, steps: int = 20) -> FactorProbes:
        return FactorProbes(labelled(probe, test), probe[0], test[0], seed=seed, steps=steps)

    first = made()
    first.read_ceilings(tmp_path)
    (file,) = tmp_path.glob("ceilings-*.pt")
    written = file.stat().st_mtime_ns
    again = made()
    again.read_ceilings(tmp_path)
    assert file.stat().st_mtime_ns == written
    for name, factor in first.factors["touch"].items():
        for kind, reading in factor.readings["stage1"].items():
            found = again.factors["touch"][name].readings["stage1"][kind]
            assert torch.equal(found.correct, reading.correct)
            assert (found.bits, found.r2) == (reading.bits, reading.r2)
    file.write_bytes(file.read_bytes()[:100])  # damaged
    mended = made()
    mended.read_ceilings(tmp_path)
    assert file.stat().st_size > 100
    assert (
        mended.factors["touch"]["shape"].readings["stage1"].keys()
        == first.factors["touch"]["shape"].readings["stage1"].keys()
    )
    made(seed=1).read_ceilings(tmp_path)
    made(steps=10).read_ceilings(tmp_path)
    test[0].frozen.modalities["touch"].tokens[5] += 1
    made().read_ceilings(tmp_path)
    labels = labelled(probe, test)
    labels.values["0-3"]["shape"] = (labels.values["0-3"]["shape"] + 1) % 4
    FactorProbes(labels, probe[0], test[0], seed=0, steps=20).read_ceilings(tmp_path)
    assert len(list(tmp_path.glob("ceilings-*.pt"))) == 5


def test_ceilings_are_fitted_on_their_own_rows() -> None:
    """On rows whose labels are shifted, every ceiling is wrong; the probes of tokens, on the probe rows, are right."""
    probe, test, other = planted(300, 0), planted(100, 1), planted(300, 2)
    labels = labelled(probe, test, other)
    for name in other[0].names:
        labels.values[name]["shape"] = (labels.values[name]["shape"] + 1) % 4
    made = FactorProbes(labels, probe[0], test[0], 0, 60, other[0])
    made.read_ceilings()
    made.read({"overlapping": Group({"touch": probe[2]["overlapping"]}, {"touch": test[2]["overlapping"]})})
    shape = made.factors["touch"]["shape"]
    assert shape.best("stage1").accuracy < 10
    assert shape.best("overlapping").accuracy > 95


def test_ceilings_need_no_folder_that_can_be_written_to(tmp_path: Path) -> None:
    made = FactorProbes(labelled(planted(60, 0), planted(30, 1)), planted(60, 0)[0], planted(30, 1)[0], seed=0, steps=3)
    made.read_ceilings(tmp_path / "missing" / "folder")
    assert made.factors["touch"]["shape"].readings["stage1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tokens_on_the_cpu_are_probed_on_the_device_of_the_rows() -> None:
    probe, test = planted(300, 0), planted(100, 1)
    sides = [Rows(rows.names, rows.frozen.to(torch.device("cuda"))) for rows, _, _ in (probe, test)]
    made = FactorProbes(labelled(probe, test), *sides, seed=0, steps=100)
    made.read({"overlapping": Group({"touch": probe[2]["overlapping"]}, {"touch": test[2]["overlapping"]})})
    assert made.factors["touch"]["shape"].best("overlapping").accuracy > 95


def test_half_the_rows_are_the_first_half() -> None:
    """What the second half of the probe rows holds does not change a reading of half of them."""
    probe, test = planted(200, 0), planted(100, 1)
    found = []
    for junk in (0.0, 50.0):
        made = FactorProbes(labelled(probe, test), probe[0], test[0], seed=0, steps=20)
        tokens = probe[2]["overlapping"].clone()
        tokens[100:] += junk
        sides = {"touch": tokens}, {"touch": test[2]["overlapping"]}
        made.read({"half": Group(*sides, share=0.5)})
        made.read({"all": Group(*sides)})
        found.append(made.factors["touch"]["shape"].readings)
    assert found[0]["half"]["linear"].bits == found[1]["half"]["linear"].bits
    assert found[0]["all"]["linear"].bits != found[1]["all"]["linear"].bits


def test_factors_that_cannot_be_probed_are_left_out_with_a_reason() -> None:
    probe, test = planted(200, 0), planted(50, 1)
    labels = labelled(probe, test)
    for i, name in enumerate(probe[0].names):
        if i >= 19:
            del labels.values[name]["shape"]
        labels.values[name]["noise"] = 1
    for name in test[0].names:
        del labels.values[name]["force"]
    made = FactorProbes(labels, probe[0], test[0], seed=0)
    assert made.factors == {}
    reasons = made.left_out["touch"]
    assert reasons["shape"].startswith("19 labelled probe rows")
    assert "with 1 levels" in reasons["noise"]
    assert reasons["force"].endswith("0 test rows")


def test_factors_of_other_modalities_are_not_probed() -> None:
    probe, test = planted(100, 0), planted(50, 1)
    labels = labelled(probe, test)
    labels.ownership["shape"], labels.ownership["noise"] = ("vision",), ()
    assert set(FactorProbes(labels, probe[0], test[0], seed=0).factors["touch"]) == {"force", "noise"}


def test_chance_is_the_most_frequent_level_of_the_test_rows(plain: FactorProbes) -> None:
    level = planted(300, 1)[1]["shape"]
    assert plain.factors["touch"]["shape"].chance == pytest.approx(100 * np.bincount(level).max() / 300)
    assert not math.isnan(plain.factors["touch"]["shape"].entropy)
