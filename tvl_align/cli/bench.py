"""`tvl-align bench`: run the speed benchmarks, which are in the repository but not in the installed package."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tvl_align
from tvl_align.system.console import UserError


def run(argv: Sequence[str]) -> None:
    root = Path(tvl_align.__file__).parents[1]
    if not (root / "benchmarks" / "speed.py").is_file():
        raise UserError("the benchmarks are only in the repository; clone it and install it with pip install -e .")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", *argv], env=environment, check=False)
    sys.exit(done.returncode)
