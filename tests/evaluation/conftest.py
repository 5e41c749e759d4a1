"""A real, tiny run to evaluate."""

from pathlib import Path
from typing import Any

import pytest

from tvl_align.encoders.tvl import Stage1Config
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.base import BASE, Stage2Config
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings


@pytest.fixture(scope="session")
def run(once: Any, world: Path, stage1_checkpoint: Path, feature_dir: Path) -> Path:
    """A run folder of one epoch."""

    def make(folder: Path) -> None:
        fit(
            Settings(
                Stage1Config(stage1_checkpoint),
                Stage2Config(register_token_dim=32, num_heads=4),
                DataConfig(world, views=1, feature_dir=feature_dir, num_workers=0),
                OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3),
                RunConfig(folder, "run", device="cpu"),
            ),
            BASE,
        )

    return once("measured run", make) / "run"
