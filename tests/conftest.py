"""Shared pieces: a tiny synthetic world, a tiny Stage 1 trained on it, and made-up features."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for weights

import pytest
import torch

from tvl_align.synthetic.pretrain import PretrainConfig, pretrain
from tvl_align.synthetic.world import write_world

torch.set_num_threads(1)
TRAIN, TEST = 96, 24


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of 96 + 24 synthetic samples."""
    return write_world(tmp_path_factory.mktemp("world") / "data", TRAIN, TEST, seed=3, workers=1, quiet=True)


@pytest.fixture(scope="session")
def stage1_checkpoint(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stage 1 after one epoch: barely trained, in the real formats."""
    out = tmp_path_factory.mktemp("stage1")
    return pretrain(PretrainConfig(world, out, epochs=1, batch_size=32, num_workers=0), quiet=True)
