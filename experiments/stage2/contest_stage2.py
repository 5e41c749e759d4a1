"""Every method, several seeds, the same world, Stage 1, features, epochs and samples: what `make compare` runs.

Parts that are already in the folder are not made again, so an interrupted contest goes on where it stopped.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.stage2.demo_stage2 import DemoConfig, prepare, small_settings, timed
from experiments.stage2.engine_stage2 import fit
from experiments.stage2.methods import METHODS
from experiments.stage2.results_stage2 import EvaluateConfig, evaluate_run
from tvl_align.compare import write_comparison
from tvl_align.console import UserError


@dataclass(frozen=True)
class ContestConfig:
    """Train and measure every method with several seeds on one synthetic world, then compare them."""

    out: Path = Path("contest")
    """Folder for the world, Stage 1, features, runs and the report."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs; world and Stage 1 keep seed 0."""
    train: int = 5000
    """Training samples of the world (one in ten of their groups validates)."""
    test: int = 1000
    """Test samples of the world."""
    pretrain_epochs: int = 12
    """Epochs of the small Stage 1."""
    epochs: int = 10
    """Epochs of Stage 2, the same for every method."""
    views: int = 2
    """Augmented views of every training row."""


def contest(config: ContestConfig) -> Path:
    """Returns the path of the report."""
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}; --methods takes {', '.join(METHODS)}.")
    shared = DemoConfig(
        config.out, config.train, config.test, config.pretrain_epochs, config.epochs, config.views, probe_rows=3000
    )
    world, checkpoint = prepare(shared)
    runs = []
    for name in config.methods:
        for seed in config.seeds:
            settings = small_settings(shared, world, checkpoint, name, f"{name}-{seed}")
            # The split and the views keep seed 0, so that all runs share one store; what a run draws itself has its own.
            settings = replace(settings, run=replace(settings.run, draw_seed=seed))
            runs.append(settings.folder)
            if (settings.folder / "results.json").is_file():
                continue
            timed(f"{name}, seed {seed}: {config.epochs} epochs", lambda s=settings, n=name: fit(s, METHODS[n]))
            measure = EvaluateConfig(settings.folder, probe_rows=shared.probe_rows)
            timed(f"{name}, seed {seed}: test split", lambda m=measure: evaluate_run(m))
    page = write_comparison(runs, config.out, "make compare")
    print(json.dumps({"runs": len(runs), "report": str(page.resolve())}))
    return page
