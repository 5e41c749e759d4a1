"""`tvl-align world`: write a synthetic data set in the TVL format."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tvl_align.config import parse
from tvl_align.synthetic.world import write_world
from tvl_align.system.bounds import at_least
from tvl_align.system.machine import cores

EXAMPLES = ("tvl-align world --out world", "tvl-align world --out registered --misregistration 0 --train 200")


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
    workers: int = field(default_factory=cores)
    """Parallel processes; the files do not depend on their number."""
    misregistration: float = 1.0
    """From 0, photo and touch image are registered to the pixel, to 1, the sensor is put down anywhere and at any angle."""

    def __post_init__(self) -> None:
        at_least(1, self, "workers")
        at_least(0, self, "seed")


def run(argv: Sequence[str]) -> None:
    config = parse(WorldConfig, argv, "tvl-align world", examples=EXAMPLES)
    sizes = config.train, config.test, config.seed, config.image_size, config.workers
    print(write_world(config.out, *sizes, misregistration=config.misregistration))
