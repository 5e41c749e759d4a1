"""The whole job on a synthetic world: world -> small Stage 1 -> features -> Stage 2 -> test split -> one page."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from experiments.stage2.engine_stage2 import fit
from experiments.stage2.methods import METHODS
from experiments.stage2.results_stage2 import EvaluateConfig, evaluate_run
from experiments.stage2.tvl_stage2 import Stage2Config
from tvl_align.config import DataConfig, OptimConfig, RunConfig, Settings, Stage1Config
from tvl_align.data.world import write_world
from tvl_align.encoders.pretrain import PretrainConfig, pretrain
from tvl_align.report import is_synthetic, print_table

T = TypeVar("T")


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole job on a synthetic world. Parts that are already in the folder are not made again."""

    out: Path = Path("demo")
    """Folder for the world, Stage 1, features and the run."""
    train: int = 5000
    """Training samples of the world (one in ten of their groups validates)."""
    test: int = 1000
    """Test samples of the world."""
    pretrain_epochs: int = 12
    """Epochs of the small Stage 1."""
    epochs: int = 10
    """Epochs of Stage 2."""
    views: int = 2
    """Augmented views of every training row."""
    seed: int = 0
    """Seed of everything."""


def demo(config: DemoConfig) -> Path:
    """Returns the path of the page it wrote."""
    world, small, run = config.out / "world", config.out / "stage1", config.out / "runs" / "base"
    if not (world / "factors.json").is_file():
        _timed(
            f"world: {config.train} + {config.test} synthetic samples",
            lambda: write_world(world, config.train, config.test, config.seed),
        )
    if not (small / "checkpoint.pth").is_file():
        settings = PretrainConfig(world, small, epochs=config.pretrain_epochs, seed=config.seed)
        _timed(f"Stage 1: small encoders, {config.pretrain_epochs} epochs", lambda: pretrain(settings))
    settings = stage2_settings(config, world, small / "checkpoint.pth")
    _timed(f"Stage 2: features once, then {config.epochs} epochs", lambda: fit(settings, METHODS["base"]))
    page = _timed("test split: retrieval, probes, page", lambda: evaluate_run(EvaluateConfig(run)))
    print_table(json.loads((run / "results.json").read_text(encoding="utf-8")), is_synthetic(world))
    print(f"page: {page.resolve()}")
    return page


def stage2_settings(config: DemoConfig, world: Path, checkpoint: Path) -> Settings[Stage2Config]:
    """The documented run with narrower registers and fewer epochs."""
    trained = (config.out / "runs" / "base" / "checkpoint.pth").is_file()
    return Settings(
        Stage1Config(checkpoint),
        Stage2Config(register_token_dim=256),
        DataConfig(world, views=config.views, no_text_prompt=True, shuffle_text=True, replace_synonyms=True, num_workers=2),
        OptimConfig(batch_size=128, epochs=config.epochs, warmup_epochs=1, lr=1e-3),
        RunConfig(config.out / "runs", "base", seed=config.seed, resume="auto" if trained else ""),
    )


def _timed(what: str, job: Callable[[], T]) -> T:
    print(f"== {what}", flush=True)
    began = time.perf_counter()
    result = job()
    print(f"   {time.perf_counter() - began:.0f} s", flush=True)
    return result
