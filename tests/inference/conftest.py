"""A tiny trained run, and the test rows of its world."""

from pathlib import Path
from typing import Any

import pytest

from tvl_align.data.tvl import Row, read_tvl
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.inference.registers import Registers, load
from tvl_align.methods.base import BASE, Stage2Config
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings


@pytest.fixture(scope="session")
def run(once: Any, world: Path, stage1_checkpoint: Path) -> Path:
    """A run folder of one epoch, beside its store."""

    def make(folder: Path) -> None:
        knobs, data = Stage2Config(register_token_dim=32, num_heads=4), DataConfig(world, views=1, num_workers=0)
        optim = OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3)
        fit(Settings(Stage1Config(stage1_checkpoint), knobs, data, optim, RunConfig(folder, "run", device="cpu")), BASE)

    return once("run in use", make) / "run"


@pytest.fixture(scope="session")
def registers(run: Path) -> Registers:
    return load(run, device="cpu")


@pytest.fixture(scope="session")
def rows(world: Path) -> list[Row]:
    return read_tvl(world).test
