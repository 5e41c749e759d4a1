"""Checks every method: `python experiments/stage2/test_modules.py [METHOD ...]` from anywhere; pytest does the same."""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder would load every module a second time

from experiments.stage2.methods import METHODS
from tvl_align.training.checks import CHECKS, check_all

__all__ = ["CHECKS", "METHODS"]

if __name__ == "__main__":
    check_all(METHODS, sys.argv[1:])
