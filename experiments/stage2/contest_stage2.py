"""Every method, several seeds, the same world, Stage 1, features, epochs and samples: what `make compare` runs.

Parts that are already in the folder are not made again, so an interrupted contest goes on where it stopped.
"""

import json
import os
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from experiments.stage2.demo_stage2 import DemoConfig, prepare, small_settings, timed
from experiments.stage2.engine_stage2 import fit, load_inputs
from experiments.stage2.methods import METHODS
from experiments.stage2.results_stage2 import EvaluateConfig, evaluate_run
from tvl_align.compare import write_comparison
from tvl_align.config import Settings
from tvl_align.console import UserError
from tvl_align.runtime import pick_device, run_in_processes


@dataclass(frozen=True)
class ContestConfig(DemoConfig):
    """Train and measure every method with several seeds on one synthetic world, then compare them."""

    out: Path = Path("contest")
    """Folder for the world, Stage 1, features, runs and the report."""
    train: int = 20_000
    """Training samples of the world (one in ten of their groups validates)."""
    pretrain_epochs: int = 3
    """Epochs of the small Stage 1."""
    epochs: int = 2
    """Epochs of Stage 2, the same for every method."""
    seed: int = 0
    """Seed of the world, Stage 1, the split and the stored views, which all runs share."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs: order, views, dropout, initial weights."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Runs at a time; the cores are shared among them."""


def contest(config: ContestConfig) -> Path:
    """Returns the path of the report."""
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise UserError(f"unknown method {unknown[0]!r}; --methods takes {', '.join(METHODS)}.")
    world, checkpoint = prepare(config)
    settings: dict[tuple[str, int], Settings[Any]] = {}
    for seed, name in product(config.seeds, config.methods):
        of_run = small_settings(config, world, checkpoint, name, f"{name}-{seed}")
        settings[name, seed] = replace(of_run, run=replace(of_run.run, draw_seed=seed))
    first = next(iter(settings.values()))
    timed("features", lambda: load_inputs(first, pick_device(None)))
    todo = [key for key, s in settings.items() if not (s.folder / "results.json").is_file()]
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    jobs = {settings[key].folder.name: (_run, settings[key], key[0], config.probe_rows) for key in todo}
    run_in_processes(jobs, config.jobs, threads)
    page = write_comparison([s.folder for s in settings.values()], config.out, "make compare")
    print(json.dumps({"runs": len(settings), "report": str(page.resolve())}))
    return page


def _run(settings: Settings[Any], name: str, probe_rows: int) -> None:
    label = settings.folder.name
    timed(f"{label}: {settings.optim.epochs} epochs", lambda: fit(settings, METHODS[name]))
    timed(f"{label}: test split", lambda: evaluate_run(EvaluateConfig(settings.folder, probe_rows=probe_rows)))
