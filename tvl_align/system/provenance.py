"""Provenance of a result: command, working directory, git commit, package versions, number of processes."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch.distributed as dist

from tvl_align import __version__
from tvl_align.system.distributed import world_size

FEATURE_PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "pillow")  # those that compute features
PACKAGES = (*FEATURE_PACKAGES, "numpy", "tensordict", "accelerate")


def git_commit() -> str:
    """Git commit of this package, with "-dirty" if tracked files have changed; "unknown" outside a checkout.

    A package installed inside another project's repository is outside a checkout: git does not track this file there.
    """
    here = Path(__file__).parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=here, capture_output=True, check=True
        )
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed packages that affect results."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _command() -> str:
    """Command line of this process, prefixed with torchrun if it was launched by torchrun."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"torchrun --nproc_per_node={world_size()} {command}" if dist.is_torchelastic_launched() else command


def provenance() -> dict[str, object]:
    """What is needed to reproduce a result: command, working directory, version, commit, package versions, number of
    processes."""
    return {
        "command": _command(),
        "folder": os.getcwd(),
        "version": __version__,
        "commit": git_commit(),
        "packages": package_versions(),
        "processes": world_size(),
    }
