"""The benchmark of methods on synthetic data (`make compare`): every method with several seeds.

All runs of a world share its data, Stage 1, stored features and split, and all runs the number of epochs. One more run per
world is a control: the first method and seed on shuffled pairs. Parts that are complete in the output folder are reused, so
an interrupted benchmark resumes.
"""

import json
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.report.compare import write_comparison
from tvl_align.report.page import write_page
from tvl_align.synthetic.demo import DemoConfig, paths, prepare, run_name, small_settings, timed, with_options
from tvl_align.system.bounds import at_least
from tvl_align.system.machine import cores
from tvl_align.system.runtime import pick_device
from tvl_align.system.workers import run_in_processes
from tvl_align.training.engine import fit
from tvl_align.training.settings import Settings


@dataclass(frozen=True)
class ContestConfig(DemoConfig):
    """Train and evaluate every method with several seeds on synthetic data, and compare them in a report."""

    out: Path = Path("contest")
    """Folder for the data, Stage 1, features, runs and the report."""
    seed: int = 0
    """Seed of the first world: its data, Stage 1, split and stored views, which all its runs share."""
    worlds: int = 1
    """Number of worlds, with seeds from --seed on; with more than one each has a folder of its own, world-<seed>."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to train; a method of your own as package.module:NAME. Options follow the name: "base --units 32"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs: order of rows, views, dropout, initial weights."""
    jobs: int = field(default_factory=cores)
    """Runs in parallel; they share the CPU cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "worlds", "jobs")


def contest(config: ContestConfig, command: str = "make compare") -> Path:
    """Run the benchmark. Prints the number of runs as JSON and returns the path of the report, which names the command."""
    for text in config.methods:
        with_options(text)  # an unknown method is an error before anything is written
    runs = {world.out: (world, _runs_of(world)) for world in worlds_of(config)}
    settings = [s for _, of_world in runs.values() for s in of_world]
    todo = [s for s in settings if not (s.folder / "results.json").is_file()]
    worlds = {str(out): (_make_features, world) for out, (world, own) in runs.items() if any(s in todo for s in own)}
    run_in_processes(worlds, config.jobs, _threads(config, len(worlds)))
    jobs = {str(s.folder): (_run, s, config.probe_rows, config.probe_steps) for s in todo}
    run_in_processes(jobs, config.jobs, _threads(config, len(jobs)))
    page = write_comparison([s.folder for s in settings], config.out, command)
    print(json.dumps({"runs": len(settings), "report": str(page.resolve())}))
    return page


def worlds_of(config: ContestConfig) -> list[ContestConfig]:
    """One config per world."""
    if config.worlds == 1:
        return [config]
    seeds = range(config.seed, config.seed + config.worlds)
    return [replace(config, seed=seed, out=config.out / f"world-{seed}") for seed in seeds]


def _threads(config: ContestConfig, processes: int) -> int:
    """Torch threads of each of some processes, of which `jobs` run at a time."""
    return max(1, cores() // max(1, min(config.jobs, processes)))


def _make_features(config: ContestConfig) -> None:
    """Make a world, its Stage 1 and its stored features."""
    prepare(config)
    timed(f"{config.out}: features", lambda: _runs_of(config)[0].open_inputs(pick_device(None)))


def _runs_of(config: ContestConfig) -> list[Settings[Any]]:
    """The settings of the runs of a world."""
    world, checkpoint = paths(config)
    settings: list[Settings[Any]] = []
    for seed, text in product(config.seeds, config.methods):
        of_run = small_settings(config, world, checkpoint, text, f"{run_name(text)}-{seed}")
        settings.append(replace(of_run, run=replace(of_run.run, draw_seed=seed)))
    return [*settings, on_shuffled_pairs(settings[0])]


def on_shuffled_pairs(settings: Settings[Any]) -> Settings[Any]:
    """The control of a run: the same on shuffled pairs of training rows."""
    run = replace(settings.run, log_name=f"{settings.folder.name}-shuffled-pairs")
    return replace(settings, data=replace(settings.data, shuffle_pairs=True), run=run)


def _run(settings: Settings[Any], probe_rows: int, probe_steps: int) -> None:
    label = str(settings.folder)
    timed(f"{label}: {settings.optim.epochs} epochs", lambda: fit(settings, load_method(settings.run.method)))
    timed(f"{label}: test split", lambda: _evaluate(settings.folder, probe_rows, probe_steps))


def _evaluate(run: Path, probe_rows: int, probe_steps: int) -> None:
    measure(EvaluateConfig(run, probe_rows=probe_rows, probe_steps=probe_steps))
    write_page(run)
