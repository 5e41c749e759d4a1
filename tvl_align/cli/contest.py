"""`tvl-align contest`: train and evaluate every method with several seeds, and compare them in one report."""

import shlex
from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.synthetic.contest import ContestConfig, contest

EXAMPLES = (
    "tvl-align contest",
    "tvl-align contest --methods base cursor --seeds 0 1 --train 2000 --out quick",
    "tvl-align contest --methods base 'base --no_linear' --out ablation",
)


def run(argv: Sequence[str]) -> None:
    config = parse(ContestConfig, argv, "tvl-align contest", examples=EXAMPLES)
    contest(config, shlex.join(["tvl-align", "contest", *argv]))
