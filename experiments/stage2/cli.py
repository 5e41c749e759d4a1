"""The `tvl-align` command: world | pretrain | encode | features | train | evaluate | compare | contest | bench | demo."""

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.stage2.bench_stage2 import BenchConfig, bench
from experiments.stage2.contest_stage2 import ContestConfig, contest
from experiments.stage2.demo_stage2 import DemoConfig, demo
from experiments.stage2.engine_stage2 import load_samples, make_accelerator
from experiments.stage2.launch_stage2 import submit, take_slurm, wait
from experiments.stage2.methods import METHODS
from experiments.stage2.results_stage2 import EvaluateConfig, evaluate_run
from experiments.stage2.train_stage2 import quiet_logs, train_method
from tvl_align.arrays import read_npz
from tvl_align.compare import write_comparison
from tvl_align.config import Settings, parse
from tvl_align.console import UserError, says_it_plainly
from tvl_align.data.tvl import Tolerance
from tvl_align.data.world import write_world
from tvl_align.encoders.pretrain import PretrainConfig, pretrain
from tvl_align.features import FeatureStore, open_or_encode
from tvl_align.runtime import is_main


@dataclass(frozen=True)
class WorldConfig:
    """Write a synthetic world in the TVL format, with its ground truth."""

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


def _world(argv: Sequence[str]) -> None:
    config = parse(WorldConfig, argv, "tvl-align world")
    print(write_world(config.out, config.train, config.test, config.seed, config.image_size, config.workers))


def _pretrain(argv: Sequence[str]) -> None:
    print(pretrain(parse(PretrainConfig, argv, "tvl-align pretrain")))


def _encode(argv: Sequence[str]) -> None:
    """Takes the flags of `train`, so that the store is the one that training will look for."""
    name, rest = _method(argv)
    settings = parse(Settings[METHODS[name].knobs], rest, "tvl-align encode")
    if settings.data.store is not None:
        raise UserError(f"{settings.data.store} is already a store; train on it with --store.")
    if settings.data.views == 0:
        raise UserError("--views 0 means no feature store; give --views 1 or more to encode one.")
    stage1, samples = load_samples(settings, make_accelerator(settings).device)
    data = settings.data
    tolerance = Tolerance(data.strict, data.max_skipped)
    store = open_or_encode(settings.feature_dir, stage1, samples, data.views, data.num_workers, tolerance=tolerance)
    if is_main():
        print(store.folder)


@dataclass(frozen=True)
class ImportConfig:
    """Make a feature store from arrays of any two or more modalities (the names in the file: tvl_align/arrays.py)."""

    npz: Path
    """File of numpy.savez."""
    out: Path
    """New or empty folder for the store."""
    seed: int = 0
    """Seed of the split, where the file has none."""


def _features(argv: Sequence[str]) -> None:
    if list(argv[:1]) in (["-h"], ["--help"]):
        argv = ["import", *argv]
    if list(argv[:1]) != ["import"]:
        raise UserError("usage: tvl-align features import --npz FILE --out STORE")
    config = parse(ImportConfig, argv[1:], "tvl-align features import")
    store = FeatureStore.from_arrays(read_npz(config.npz, config.seed), config.out)
    rows = ", ".join(f"{len(split)} {name}" for name, split in store.splits.items())
    print(f"{', '.join(store.specs)}: {rows} rows")
    print(store.folder)


def _train(argv: Sequence[str]) -> None:
    options, flags = take_slurm(argv)
    name, rest = _method(flags)
    if not options:
        train_method(name, rest)
        return
    settings = parse(Settings[METHODS[name].knobs], rest, "tvl-align train")  # refused here, not hours later in the queue
    job = submit(name, rest, options, settings.folder)
    print(f"job {job.job_id}; its log: {job.paths.stdout}")
    if options.get("cluster") in ("local", "debug"):
        wait(job)


def _evaluate(argv: Sequence[str]) -> None:
    print(evaluate_run(parse(EvaluateConfig, argv, "tvl-align evaluate")))


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs of any methods and seeds that were made on the same data."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders that `evaluate` has measured."""
    out: Path = Path("comparison")
    """Where report.html and report.md are written."""


def _compare(argv: Sequence[str]) -> None:
    config = parse(CompareConfig, argv, "tvl-align compare")
    print(write_comparison(config.runs, config.out, shlex.join(["tvl-align", "compare", *argv])))


def _contest(argv: Sequence[str]) -> None:
    contest(parse(ContestConfig, argv, "tvl-align contest"))


def _bench(argv: Sequence[str]) -> None:
    bench(parse(BenchConfig, argv, "tvl-align bench"))


def _demo(argv: Sequence[str]) -> None:
    demo(parse(DemoConfig, argv, "tvl-align demo"))


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "world": ("write a synthetic world in the TVL format", _world),
    "pretrain": ("train a small Stage 1 on a folder in the TVL format", _pretrain),
    "encode": ("compute the frozen features once (same flags as train)", _encode),
    "features": ("import features of your own: any modalities, no Stage 1", _features),
    "train": ("train Stage 2 (--method base by default; --slurm partition=... as a job)", _train),
    "evaluate": ("measure a run on the test split and write its page", _evaluate),
    "compare": ("rank measured runs on one page", _compare),
    "contest": ("every method, several seeds, one synthetic world", _contest),
    "bench": ("what things cost, as ratios", _bench),
    "demo": ("all of the above on a synthetic world, in minutes", _demo),
}


@says_it_plainly
def main() -> None:
    """Entry point of `tvl-align`."""
    quiet_logs()
    usage = "usage: tvl-align COMMAND [--help]\n\n" + "\n".join(f"  {n:10s} {what}" for n, (what, _) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        return
    name = sys.argv[1]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {name!r}; {hint}")
    COMMANDS[name][1](sys.argv[2:])


def _method(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take `--method NAME` out of the flags (default: base)."""
    rest = list(argv)
    name = "base"
    for i, flag in enumerate(rest):
        if flag == "--method" and i + 1 < len(rest):
            name = rest[i + 1]
            del rest[i : i + 2]
            break
        if flag.startswith("--method="):
            name = rest.pop(i).removeprefix("--method=")
            break
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; --method takes {', '.join(METHODS)}.")
    return name, rest
