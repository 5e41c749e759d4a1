"""`tvl-align contest`: train and evaluate every method with several seeds, and compare them in one report."""

from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.synthetic.contest import ContestConfig, contest

EXAMPLES = ("tvl-align contest", "tvl-align contest --methods base cursor --seeds 0 1 --train 2000 --out quick")


def run(argv: Sequence[str]) -> None:
    contest(parse(ContestConfig, argv, "tvl-align contest", examples=EXAMPLES))
