"""RePercENT's own training, on a clone made for the test: what is built, what is kept, and what is read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import repercent_training as module
from benchmarks.repercent import Readings
from benchmarks.repercent_training import TrainingConfig
from tvl_align.features.arrays import check_arrays
from tvl_align.system.console import UserError

CLONE = {
    "src/__init__.py": "",
    "src/parts.py": "SCALE = 2.0\n",
    "src/models/perceiver.py": """
class Perceiver:
    def __init__(self, **options):
        self.options = options
""",
    "src/models/repercent.py": """
import os, sys
sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), '../..')))
import torch
from torch import nn
from src.parts import SCALE

class DisenEncoder(nn.Module):
    def __init__(self, encoder_model, perceiver_model):
        super().__init__()
        self.options = perceiver_model.options

class RePercENT(nn.Module):
    def __init__(self, M, disenEncoder, disen_mapping):
        super().__init__()
        self.M, self.weight = M, nn.Parameter(torch.ones(1))
        assert disen_mapping == {"M_1": {"U_12": 0, "S_12": 1}, "M_2": {"U_21": 0, "S_21": 1}}
        for encoder in disenEncoder:
            assert encoder.options["max_freq"] == 4 and encoder.options["num_freq_bands"] == 3
            assert encoder.options["cross_dim_head"] == 16 and encoder.options["input_channels"] == 64

    def forward(self, x, mask):
        assert mask == [None, None]
        out = {name: torch.zeros(len(x[0]), self.M, self.M, 1) for name in ("U", "S_view")}
        for i, j in ((0, 1), (1, 0)):
            out["U"][:, i, j] = SCALE * self.weight * x[i][:, 0, :1]
            out["S_view"][:, i, j] = self.weight * x[i][:, 0, 1:2]
        return out

class DisenLoss(nn.Module):
    def __init__(self, M, **weights):
        super().__init__()
        assert weights == {"alpha": 2, "beta": 0.1, "lmd": 1.0, "lmd_start_value": 0.1, "lmd_end_value": 1.0,
            "lmd_n_iterations": 8000, "lmd_start_iteration": 800} and M == 2

    def forward(self, outputs, views):
        loss = (outputs["U"] - views["U"]).square().mean()
        return loss, {"fw_loss": loss.item()}
""",
    "src/utils/synthetic_dataset.py": """
import numpy as np
import torch

class GenerateData:
    @staticmethod
    def augment_data(x, aug_type, generator):
        assert aug_type == "random"
        return x + torch.randn(x.shape, generator=generator)
""",
    "configs/data/synthetic_data_2m.yaml": "create_data: {ts: [8, 8]}",
    "configs/model/repercent_2m.yaml": (
        "perceiver: {latent_dim: 32, input_channels: [64, 64], depth: 3, input_axis: 1, num_latents: 2, cross_heads: 2,"
        " latent_heads: 2, weight_tie_layers: false, pos_encoding: false, use_moeffn: false}\n"
        "repercent: {disen_mapping: {M_1: {U_12: 0, S_12: 1}, M_2: {U_21: 0, S_21: 1}}}"
    ),
    "configs/training/train_synthetic_2m.yaml": (
        "disen_loss: {alpha: 2, beta: 0.1, lmd: 1.0, lmd_start_value: 0.1, lmd_end_value: 1.0, lmd_n_iterations: 8000,"
        " lmd_start_iteration: 800, ortho_norm: true}\n"
        "optimizer: {lr: 0.01, weight_decay: 0.0}\ntraining: {batch_size: 64}"
    ),
}


def made_clone(folder: Path) -> Path:
    for name, text in CLONE.items():
        file = folder / "RePercENT" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def made_pair(data: Path, seed: int) -> Any:
    """Two modalities of 8 tokens: the first number is unique, the second shared."""
    assert seed == 0
    g, rows = np.random.default_rng(0), (600, 40, 400)
    x = {m: g.standard_normal((sum(rows), 8, 64)) for m in ("x1", "x2")}
    x["x2"][:, 0, 1] = x["x1"][:, 0, 1]
    labels = {"u_12": x["x1"][:, 0, 0] > 0, "u_21": x["x2"][:, 0, 0] > 0, "s_12": x["x1"][:, 0, 1] > 0}
    owners = {"u_12": ("x1",), "u_21": ("x2",), "s_12": ("x1", "x2")}
    split = np.repeat(["train", "val", "test"], rows)
    return check_arrays(x, labels={k: v.astype(np.int64) for k, v in labels.items()}, owners=owners, split=split)


def test_the_clone_is_trained_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model here tells unique and shared numbers apart by construction: every part is where it belongs."""
    monkeypatch.setattr(module, "pair", made_pair)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    found = module.train(TrainingConfig(made_clone(tmp_path), modalities=2, epochs=2))
    assert found.unique > 98 and found.shared > 98
    assert abs(found.unique_from_shared - 50) < 5 and abs(found.shared_from_unique - 50) < 5


def test_the_result_names_its_config_command_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "found.json"
    monkeypatch.setattr(module, "train", lambda config: Readings(90.0, 80.0, 55.0, 60.0))
    monkeypatch.setattr("sys.argv", ["x", "--data", str(tmp_path), "--seed", "3", "--out", str(out)])
    module.main()
    content = json.loads(out.read_text())
    assert (content["unique"], content["shared_from_unique"]) == (90.0, 60.0)
    assert content["distance"] == Readings(90.0, 80.0, 55.0, 60.0).distance
    assert (content["config"]["seed"], content["config"]["data"]) == (3, str(tmp_path))
    assert {"command", "commit"} <= content["made_by"].keys()
    assert f"distance {content['distance']:.1f}: unique 90.0" in capsys.readouterr().out


def test_the_epoch_with_the_lowest_validation_loss_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: list[Tensor], mask: list[None]) -> dict[str, Tensor]:
            return {"U": self.weight * torch.ones(len(x[0]))}

    class Rising(nn.Module):
        """Its loss lets the weight rise by 0.1 a step; the validation loss is lowest at 0.3."""

        def forward(self, outputs: dict[str, Tensor], views: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
            weight = outputs["U"].mean()
            return -weight, {"fw_loss": abs(weight.item() - 0.3)}

    model, settings = Model(), {"optimizer": {"lr": 0.1, "weight_decay": 0.0}, "training": {"batch_size": 8}}
    splits = {name: [torch.zeros(8, 1)] for name in ("train", "val")}
    module._fit(model, Rising(), lambda x, **_: x, splits, settings, TrainingConfig(Path(), 2, epochs=6))
    assert model.weight.item() == pytest.approx(0.3, abs=1e-3)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pair", made_pair)
    clone = made_clone(tmp_path)
    (clone / "RePercENT" / "configs" / "model" / "repercent_2m.yaml").unlink()
    with pytest.raises(UserError, match=r"repercent_2m\.yaml is missing; clone https://github.com/Vascorn/RePercENT"):
        module.train(TrainingConfig(clone, modalities=2, epochs=1))
    with pytest.raises(UserError, match="--modalities 4 is out of range"):
        TrainingConfig(clone, modalities=4)
