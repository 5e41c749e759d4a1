"""`tvl-align train`, and the functions that the entry files in experiments/ call."""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch

from tvl_align.config import parse
from tvl_align.contract import Method
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.system.console import quiet_logs, reports_errors
from tvl_align.training.engine import fit
from tvl_align.training.settings import Settings
from tvl_align.training.slurm import split_slurm_options, submit, wait

ABOUT = "Train a Stage-2 method: register tokens over frozen features. Options of registers and losses depend on --method."
EXAMPLES = (
    "tvl-align train --stage1_checkpoint stage1/checkpoint.pth --datasets_dir world --log_name mine",
    "tvl-align train --method cursor --store store --slurm partition=gpu --slurm nodes=2 --slurm tasks_per_node=8",
)


def run(argv: Sequence[str]) -> None:
    train(argv, prog="tvl-align train")


@reports_errors
def train_method(name: str, argv: Sequence[str] | None = None, module: str = "") -> None:
    """Entry point: train the method `name`, unless the flags give another `--method`.

    argv: flags; default: sys.argv[1:]. module: where `--method NAME` finds methods that do not ship, as module:NAME.
    """
    quiet_logs()
    train(sys.argv[1:] if argv is None else argv, name, module=module)


def train(argv: Sequence[str], default: str = "base", prog: str | None = None, module: str = "") -> None:
    """Train in this process, or submit a Slurm job if `--slurm` is given. default: the method without `--method`."""
    options, flags = split_slurm_options(argv)
    # Parsed here as well, so that invalid flags fail before the job is submitted.
    settings, method, flags = read_settings(flags, prog, ABOUT, EXAMPLES, default, module)
    if options:
        job = submit(train, flags, options, settings.folder)
        print(f"submitted job {job.job_id}; log: {job.paths.stdout}")
        if options.get("cluster") in ("local", "debug"):
            wait(job)
        return
    try:
        fit(settings, method)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def read_settings(
    argv: Sequence[str],
    prog: str | None,
    about: str,
    examples: Sequence[str],
    default: str = "base",
    module: str = "",
) -> tuple[Settings[Any], Method, list[str]]:
    """Parse flags -> settings, method, and the flags with an explicit `--method`. Without a value it is `default`."""
    name, rest = split_method(argv, default)
    if module and name not in METHODS and ":" not in name:
        name = f"{module}:{name}"  # the run folder stores a name that every command can import
    method = load_method(name)
    flags = [*rest, "--method", name]
    settings_type = cast(Any, Settings)[method.knobs]
    return parse(settings_type, flags, prog, about, examples), method, flags


def split_method(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Split flags into the name given by `--method NAME`, or `default`, and the rest."""
    rest = list(argv)
    for i, flag in enumerate(rest):
        if flag == "--method" and i + 1 < len(rest):
            name = rest[i + 1]
            del rest[i : i + 2]
            return name, rest
        if flag.startswith("--method="):
            return rest.pop(i).removeprefix("--method="), rest
    return default, rest
