"""Complementary codes trained again: the overlapping half stays as it was, and the other half learns."""

import json
from pathlib import Path

import pytest
import torch
from base_and_mlp import train_base_and_mlp

from benchmarks.second_phase import LEARNT, SecondPhaseConfig, second_phase
from tvl_align.config import parse
from tvl_align.system.console import UserError


def test_the_documented_command_is_parsed() -> None:
    expected = SecondPhaseConfig(Path("contest/runs/base-0"), split="val")
    assert parse(SecondPhaseConfig, ["contest/runs/base-0", "--split", "val"]) == expected


@pytest.mark.slow
def test_the_overlapping_half_stays_and_the_other_half_learns(tmp_path: Path) -> None:
    runs = train_base_and_mlp(tmp_path)
    folder = second_phase(SecondPhaseConfig(runs / "base", independence_weight=0.1))
    assert folder == (runs / "base-again-12-3-0.1").resolve()
    first, again = (torch.load(f / "checkpoint.pth")["model"] for f in (runs / "base", folder))
    kept = [k for k in again if not k.startswith((*LEARNT, "codes.over", "codes.comp", "widen"))]
    assert {"registers", "trunk.project.weight", "linear.weight", "narrow.weight"} <= {*kept}
    assert all(torch.equal(first[k], again[k]) for k in kept)
    assert again["comp_linear.weight"].shape[-1] == 12
    results = json.loads((folder / "results.json").read_text())
    before, after = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (runs / "base", folder)
    )
    assert results["method"] == "second_phase"
    assert after[0]["val_average_acc1"] == after[1]["val_average_acc1"] == before[-1]["val_average_acc1"]
    assert after[1]["train_preservation"] < after[0]["train_preservation"]
    with pytest.raises(UserError, match="mlp is a run of stage2_mlp; give a run of base"):
        second_phase(SecondPhaseConfig(runs / "mlp"))
