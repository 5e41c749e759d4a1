"""Other attackers than the probes of the evaluation: what they find in planted codes, and a whole run on random arrays."""

import json
from pathlib import Path

import numpy as np
import pytest
from base_and_mlp import train_base_and_mlp

from benchmarks.attack import AttackConfig, attack, attackers, fit
from tvl_align.config import parse
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.system.console import UserError


def test_the_documented_command_is_parsed() -> None:
    assert parse(AttackConfig, ["demo/runs/base"]) == AttackConfig(Path("demo/runs/base"))


def test_attackers_find_a_factor_in_the_product_of_two_units_and_nothing_in_noise() -> None:
    x = np.random.default_rng(0).standard_normal((1200, 4))
    planted, noise = (x[:, 0] * x[:, 1] > 0).astype(int), np.random.default_rng(1).integers(0, 2, 1200)
    for name, classifier in attackers(0).items():
        assert classifier.fit(x[:800], planted[:800]).score(x[800:], planted[800:]) > 0.8, name
        assert 0.4 < classifier.fit(x[:800], noise[:800]).score(x[800:], noise[800:]) < 0.6, name


def test_a_run_that_was_not_evaluated_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no results.json; evaluate the run first: tvl-align evaluate"):
        attack(AttackConfig(tmp_path))


def test_a_level_with_one_row_is_fitted_too() -> None:
    """Rows held out by level would need two of it."""
    x, y = np.random.default_rng(0).standard_normal((60, 3)), np.array([0] * 30 + [1] * 29 + [2])
    assert all(0 <= fit(c, x, y).score(x, y) <= 1 for c in attackers(0, held_out=False).values())


@pytest.mark.slow
def test_a_run_is_attacked_with_its_probe_rows_and_with_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_base_and_mlp(tmp_path) / "base"
    results = json.loads(measure(EvaluateConfig(run, probe_steps=20)).read_text())
    found = json.loads(attack(AttackConfig(run)).read_text())
    assert found["rows"]["probe rows"] == results["probe_rows"]["rows"] < found["rows"]["more rows"]
    for group, modalities in found["factors"].items():
        entries = [(m, f, entry) for m, factors in modalities.items() for f, entry in factors.items()]
        for m, f, entry in entries:
            read = results["factors"][m][f]
            assert m in read["ownership"] and (len(read["ownership"]) > 1) == (group == "complementary")
            assert entry["probes"] == read["score"][group]
        for size in found["rows"]:
            strongest = [max(scores[size] for scores in entry["attackers"].values()) for *_, entry in entries]
            assert found["summary"][group][size] == pytest.approx(np.mean(strongest))
    assert [list(factors) for factors in found["factors"]["complementary"].values()] == [["side"], ["side"]]
    assert "shared leak: probes " in capsys.readouterr().out
