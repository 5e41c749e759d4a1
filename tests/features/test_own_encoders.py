"""Training and embedding with encoders of one's own in place of TVL's."""

from pathlib import Path

import pytest
import timm
import torch

import tvl_align
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), path)
    return path


def settings(world: Path, out: Path, stage1: Stage1Config) -> Settings[MLPConfig]:
    return Settings(
        stage1,
        MLPConfig(register_token_dim=32, hidden=8),
        DataConfig(world, views=1, num_workers=0, active_modality_names=("vision", "tactile"), probe_rows=0),
        OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3),
        RunConfig(out, "run", device="cpu", method="mlp"),
    )


def test_own_encoders_are_trained_on_and_embed_without_a_stage_1(world: Path, weights: Path, tmp_path: Path) -> None:
    name = f"timm:vit_tiny_patch16_224:{weights}"
    fit(settings(world, tmp_path, Stage1Config(vision_encoder=name, tactile_encoder=name)), MLP)
    registers = tvl_align.load(tmp_path / "run", device="cpu")
    options = registers.image_options
    assert (options.photo_size, options.touch_size) == (32, 32)
    assert options.photo_mean == options.touch_mean == (0.5, 0.5, 0.5)  # what timm says of this model
    out = registers.embed(vision=[world / str(read_tvl(world).train[0].vision)])
    split = registers.embed_split(registers.open_store().splits["train"])
    assert float((split.pooled["vision"] @ out.pooled["vision"][0]).max()) == pytest.approx(1, abs=1e-4)


def test_a_modality_without_encoder_and_without_stage_1_is_refused(world: Path, weights: Path, tmp_path: Path) -> None:
    name = f"timm:vit_tiny_patch16_224:{weights}"
    with pytest.raises(
        UserError,
        match=r"no features to train on; give --stage1_checkpoint FILE, an encoder of your own for each modality "
        r"\(--vision_encoder ..., --more_encoders\), or",
    ):
        settings(world, tmp_path, Stage1Config(vision_encoder=name))
