"""The oracle trained with labels: whose gradient is whose, and a whole run on random arrays."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from base_and_mlp import train_base_and_mlp

from benchmarks.supervised import OracleConfig, Supervised, SupervisedConfig, SupervisedLoss, supervised
from tvl_align.config import parse
from tvl_align.system.console import UserError
from tvl_align.training.checks import SPECS, random_features

KNOBS = SupervisedConfig(
    register_token_dim=32, num_heads=4, factors=("vision hue 3 shared", "vision light 2 unique", "text hue 3 shared")
)


def test_the_documented_command_is_parsed() -> None:
    assert parse(OracleConfig, ["demo/runs/base"]) == OracleConfig(Path("demo/runs/base"))


def numbers(**changes: float) -> tuple[Supervised, dict[str, torch.Tensor]]:
    """A model and its losses on 8 rows with labels; text has them in the rows' own sentences, the even rows."""
    torch.manual_seed(0)
    knobs = replace(KNOBS, **changes)  # type: ignore[arg-type]
    model, features = Supervised(SPECS, knobs).train(), random_features(8)
    keys = torch.stack([torch.arange(8), torch.arange(8) + torch.arange(8) % 2], dim=1)
    levels = {("vision", "hue"): torch.arange(8) % 3, ("vision", "light"): torch.arange(8) % 2}
    levels["text", "hue"] = torch.arange(8) % 3
    return model, SupervisedLoss(levels, knobs)(model(replace(features, caption_keys=keys)))


def test_heads_and_adversaries_add_to_the_loss_of_the_base() -> None:
    _, without = numbers(label_weight=0.0, adversary_weight=0.0)
    _, found = numbers(label_weight=2.0, adversary_weight=3.0)
    expected = without["total_loss"] + 2 * found["label_loss"] + 3 * found["label_leak"]
    torch.testing.assert_close(found["total_loss"], expected)
    assert found["label_loss"] > 2  # six cross-entropies near log 3 and log 2
    assert 0 < found["label_leak"] < 1


def test_an_adversary_learns_from_its_own_loss_only_and_the_code_from_its_answer() -> None:
    model, found = numbers()
    found["label_leak"].backward()
    assert all(p.grad is None for p in model.adversaries.parameters())
    assert model.linear is not None
    assert model.linear.weight.grad is not None  # `light` is to be absent from the overlapping code
    assert model.linear.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_oracle_of_a_run_is_trained_next_to_it_and_measured(tmp_path: Path) -> None:
    runs = train_base_and_mlp(tmp_path)
    folder = supervised(OracleConfig(runs / "base"))
    assert folder == (runs / "base-supervised").resolve()
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == "supervised_oracle"
    assert results["factors"]["touch"]["side"]["score"].keys() >= {"overlapping", "complementary"}
    losses = [json.loads(line)["train_label_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]
    with pytest.raises(UserError, match="mlp is a run of stage2_mlp; give a run of base"):
        supervised(OracleConfig(runs / "mlp"))
