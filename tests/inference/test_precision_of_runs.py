"""New inputs are encoded in the precision of the features that the run was trained on, whatever the device."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tvl_align.data.tvl import Row
from tvl_align.encoders.tvl import Stage1Config, load_stage1
from tvl_align.features.inputs import DataConfig
from tvl_align.inference.registers import Registers, load
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import find_checkpoint
from tvl_align.training.settings import RunConfig, Settings


@pytest.fixture(scope="module")
def trained(world: Path, stage1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings[MLPConfig]:
    """A run of one epoch whose features are of bf16, as by default on a GPU."""
    settings = Settings(
        Stage1Config(stage1_checkpoint, encode_precision="bf16"),
        MLPConfig(register_token_dim=32, hidden=8),
        DataConfig(world, views=1, num_workers=0),
        OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3),
        RunConfig(tmp_path_factory.mktemp("O"), "run", device="cpu", method="mlp"),
    )
    fit(settings, MLP)
    path = settings.folder / "config.json"
    config = json.loads(path.read_text())
    assert config["features"]["precision"] == "bf16"
    config["settings"]["stage1"]["encode_precision"] = "auto"
    path.write_text(json.dumps(config))
    return settings


def test_embed_encodes_in_the_precision_of_the_run(trained: Settings[MLPConfig], world: Path, rows: list[Row]) -> None:
    registers, touches = load(trained.folder, device="cpu"), [world / str(row.tactile) for row in rows]
    assert registers.precision == registers.stage1.precision == "bf16"
    found = {p: registers.embed(tactile=touches, precision=p).pooled["tactile"] for p in (None, "bf16", "float32")}
    stored = registers.embed_split(registers.open_store().splits["test"]).pooled["tactile"]
    error = {p: float((x - stored).abs().mean()) for p, x in found.items()}
    assert torch.equal(found[None], found["bf16"])
    assert error[None] < 0.2 * error["float32"]


def test_a_run_on_float32_embeds_in_float32(registers: Registers, stage1_checkpoint: Path, world: Path) -> None:
    """As all runs of earlier versions, also on encoders that were given with another precision."""
    assert registers.precision == "float32"
    touch = next(world.rglob("*.jpg"))
    expected = registers.embed(tactile=touch).pooled["tactile"]
    assert torch.equal(registers.embed(tactile=touch, precision="float32").pooled["tactile"], expected)
    given = load(registers.folder, device="cpu", stage1=load_stage1(stage1_checkpoint, encode_precision="bf16"))
    assert torch.equal(given.embed(tactile=touch).pooled["tactile"], expected)
    with pytest.raises(UserError, match="no precision 'half'; give one of float32, bf16, fp16"):
        registers.embed(tactile=touch, precision="half")  # type: ignore[arg-type]


def test_a_run_resumes_whatever_its_option_was(trained: Settings[MLPConfig]) -> None:
    """On another device "auto" is another precision; the identity of the features says which one is that of the run."""
    other = replace(trained, stage1=replace(trained.stage1, encode_precision="auto"))
    assert find_checkpoint(other, MLP.implementation) is not None
