"""`tvl-align compare`: rank runs in one report."""

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
    """Compare evaluated runs of any methods and seeds, trained on the same data."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with a results.json, written by tvl-align evaluate."""
    out: Path = Path("comparison")
    """Folder for report.html and report.md."""
    datasets_dir: Path | None = None
    """Data folder whose images are shown; default: where they were when the runs were evaluated."""


def run(argv: Sequence[str]) -> None:
    config = parse(CompareConfig, argv, "tvl-align compare", examples=EXAMPLES)
    command = shlex.join(["tvl-align", "compare", *argv])
    print(write_comparison(config.runs, config.out, command, config.datasets_dir))
