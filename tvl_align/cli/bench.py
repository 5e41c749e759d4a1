"""`tvl-align bench`: run the speed benchmarks of the repository this package is installed from."""

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
        raise UserError("the benchmarks are not part of the installed package; run this in a clone of the repository.")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", *argv], env=environment, check=False)
    sys.exit(done.returncode)
