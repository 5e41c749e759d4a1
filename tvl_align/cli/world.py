"""`tvl-align world`: write a synthetic data set in the TVL format."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvl_align.config import parse
from tvl_align.synthetic.world import write_world

EXAMPLES = ("tvl-align world --out world", "tvl-align world --out small --train 200 --test 50 --seed 1")


@dataclass(frozen=True)
class WorldConfig:
    """Write a synthetic data set in the TVL format, with the ground-truth factors in factors.csv."""

    out: Path
    """Folder for the data set; new or empty."""
    train: int = 5000
    """Number of training samples."""
    test: int = 1000
    """Number of test samples."""
    seed: int = 0
    """Random seed; the same seed writes identical files."""
    image_size: int = 64
    """Side of the rendered surface, in pixels."""
    workers: int = os.cpu_count() or 1
    """Parallel processes; the files do not depend on their number."""


def run(argv: Sequence[str]) -> None:
    config = parse(WorldConfig, argv, "tvl-align world", examples=EXAMPLES)
    print(write_world(config.out, config.train, config.test, config.seed, config.image_size, config.workers))
