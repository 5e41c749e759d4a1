"""`tvl-align compare`: rank runs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from tvl_align.config import parse
from tvl_align.report.compare import write_comparison

EXAMPLES = (
    "tvl-align compare output_dir/base output_dir/cursor",
    "tvl-align compare contest/runs/base-0 contest/runs/base-1 contest/runs/cursor-0 --out seeds",
)


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs of any methods and seeds that were made on the same data."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders that `evaluate` has measured."""
    out: Path = Path("comparison")
    """Where report.html and report.md are written."""


def run(argv: Sequence[str]) -> None:
    config = parse(CompareConfig, argv, "tvl-align compare", examples=EXAMPLES)
    print(write_comparison(config.runs, config.out, shlex.join(["tvl-align", "compare", *argv])))
