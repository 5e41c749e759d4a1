"""`tvl-align train`, and what the documented entry files call: flags -> a trained run."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvl_align.config import ignored_flags, parse
from tvl_align.contract import Method
from tvl_align.methods.registry import METHODS, load_method
from tvl_align.system.console import quiet_logs, reports_errors
from tvl_align.training.engine import fit
from tvl_align.training.settings import Settings
from tvl_align.training.slurm import submit, take_slurm, wait

ABOUT = "Train Stage 2: registers over frozen features. The options of the registers are those of the method."
EXAMPLES = (
    "tvl-align train --stage1_checkpoint stage1/checkpoint.pth --datasets_dir world --log_name mine",
    "tvl-align train --method cursor --store store --slurm partition=gpu --slurm nodes=2 --slurm tasks_per_node=8",
)


def run(argv: Sequence[str]) -> None:
    train(argv, prog="tvl-align train")


@reports_errors
def train_method(name: str, argv: Sequence[str] | None = None, methods: Mapping[str, Method] = METHODS) -> None:
    """Parse the flags of a method (default: this process's own) and train it. methods: what `--method` may name beside those
    that ship."""
    quiet_logs()
    train(sys.argv[1:] if argv is None else argv, name, methods=methods)


def train(
    argv: Sequence[str], default: str = "base", prog: str | None = None, methods: Mapping[str, Method] = METHODS
) -> None:
    """Train in this process, or queue a Slurm job where `--slurm` asks for one."""
    options, flags = take_slurm(argv)
    settings, method, flags = read_settings(flags, prog, ABOUT, EXAMPLES, default, methods)  # refused before it is queued
    if options:
        job = submit(train, flags, options, settings.folder)
        print(f"job {job.job_id}; its log: {job.paths.stdout}")
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
    methods: Mapping[str, Method] = METHODS,
) -> tuple[Settings[Any], Method, list[str]]:
    """The settings and the method that flags ask for, and these flags with the method among them."""
    name, rest = take_method(argv, default)
    method = methods[name] if name in methods else load_method(name)
    flags = [*rest, "--method", name]
    ignored = "; ".join(f"--{flag} ({reason})" for flag, reason in ignored_flags(Settings[method.knobs]).items())
    note = textwrap.fill(f"Accepted, without effect: {ignored}.", 100)
    return parse(Settings[method.knobs], flags, prog, f"{about}\n\n{note}", examples), method, flags


def take_method(argv: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Take `--method NAME` out of the flags."""
    rest = list(argv)
    for i, flag in enumerate(rest):
        if flag == "--method" and i + 1 < len(rest):
            name = rest[i + 1]
            del rest[i : i + 2]
            return name, rest
        if flag.startswith("--method="):
            return rest.pop(i).removeprefix("--method="), rest
    return default, rest
