"""The whole job on a synthetic world: world -> small Stage 1 -> features -> Stage 2 -> test split -> one page."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.report.page import print_table, write_page
from tvl_align.synthetic.pretrain import PretrainConfig, pretrain
from tvl_align.synthetic.world import write_world
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings

T = TypeVar("T")


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole job on a synthetic world. Parts that are already in the folder are not made again."""

    out: Path = Path("demo")
    """Folder for the world, Stage 1, features and the run."""
    train: int = 10_000
    """Training samples of the world (one in ten of their groups validates)."""
    test: int = 1000
    """Test samples of the world."""
    pretrain_epochs: int = 6
    """Epochs of the small Stage 1."""
    epochs: int = 3
    """Epochs of Stage 2."""
    views: int = 4
    """Views of every training row beside the plain one; only their sentences differ."""
    seed: int = 0
    """Seed of everything."""
    probe_rows: int = 3000
    """Training rows that probes are fitted on, at most."""


def demo(config: DemoConfig) -> Path:
    """Returns the path of the page it wrote."""
    world, checkpoint = prepare(config)
    settings = small_settings(config, world, checkpoint, "base", "base")
    timed(f"Stage 2: features once, then {config.epochs} epochs", lambda: fit(settings, METHODS["base"]))
    of_run = EvaluateConfig(settings.folder, probe_rows=config.probe_rows)
    timed("test split: retrieval and probes", lambda: measure(of_run))
    page = write_page(settings.folder)
    print_table(settings.folder / "results.json")
    print(f"page: {page.resolve()}")
    return page


def prepare(config: DemoConfig) -> tuple[Path, Path]:
    """The world's folder and the checkpoint of its small Stage 1, made where they are missing."""
    world, small = config.out / "world", config.out / "stage1"
    if not (world / "factors.json").is_file():
        what = f"world: {config.train} + {config.test} synthetic samples"
        timed(what, lambda: write_world(world, config.train, config.test, config.seed))
    if not (small / "checkpoint.pth").is_file():
        settings = PretrainConfig(world, small, epochs=config.pretrain_epochs, seed=config.seed)
        timed(f"Stage 1: small encoders, {config.pretrain_epochs} epochs", lambda: pretrain(settings))
    return world, small / "checkpoint.pth"


def small_settings(config: DemoConfig, world: Path, checkpoint: Path, method: str, name: str) -> Settings[Any]:
    """The documented run with narrower registers and fewer epochs."""
    return Settings(
        Stage1Config(checkpoint),
        load_method(method).knobs(register_token_dim=256),
        DataConfig(
            world,
            views=config.views,
            augment_pictures=False,  # the small Stage 1 never saw a turned image
            no_text_prompt=True,
            shuffle_text=True,
            replace_synonyms=True,
            num_workers=2,
        ),
        OptimConfig(batch_size=128, epochs=config.epochs, warmup_epochs=1, lr=1e-3),
        RunConfig(config.out / "runs", name, seed=config.seed, method=method),
    )


def timed(what: str, job: Callable[[], T]) -> T:
    """Say what is done and how long it took."""
    print(f"== {what}", flush=True)
    began = time.perf_counter()
    result = job()
    print(f"   {time.perf_counter() - began:.0f} s", flush=True)
    return result
