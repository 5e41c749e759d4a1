"""Provenance of a result: command, working directory, git commit, package versions, number of processes."""

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from tvl_align.system.distributed import world_size

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "tensordict", "accelerate")


def git_commit() -> str:
    """Git commit of this package, with "-dirty" if tracked files have changed; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    return {name: version(name) for name in PACKAGES}


def _command() -> str:
    """Command line of this process, prefixed with torchrun if it was launched by torchrun."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node={world_size()} {command}" if dist.is_torchelastic_launched() else command


def provenance() -> dict[str, object]:
    """What is needed to reproduce a result: command, working directory, commit, package versions, number of processes."""
    return {
        "command": _command(),
        "folder": os.getcwd(),
        "commit": git_commit(),
        "packages": package_versions(),
        "processes": world_size(),
    }
