"""`tvl-align demo`: run the full pipeline on synthetic data."""

from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.synthetic.demo import DemoConfig, demo

EXAMPLES = ("tvl-align demo", "tvl-align demo --out tiny --train 400 --test 100 --pretrain_epochs 1 --epochs 1")


def run(argv: Sequence[str]) -> None:
    demo(parse(DemoConfig, argv, "tvl-align demo", examples=EXAMPLES))
