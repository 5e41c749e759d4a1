"""`tvl-align world`: write a synthetic data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvl_align.config import parse
from tvl_align.synthetic.world import write_world

EXAMPLES = ("tvl-align world --out world", "tvl-align world --out small --train 200 --test 50 --seed 1")


@dataclass(frozen=True)
class WorldConfig:
    """Write a synthetic data set in the TVL format, with its ground truth in factors.csv."""

    out: Path
    """New or empty folder to write to."""
    train: int = 5000
    """Training samples."""
    test: int = 1000
    """Test samples."""
    seed: int = 0
    """The same seed gives the same bytes."""
    image_size: int = 64
    """Side of the surface, in pixels."""
    workers: int = os.cpu_count() or 1
    """Processes that draw and write; they do not change the bytes."""


def run(argv: Sequence[str]) -> None:
    config = parse(WorldConfig, argv, "tvl-align world", examples=EXAMPLES)
    print(write_world(config.out, config.train, config.test, config.seed, config.image_size, config.workers))
