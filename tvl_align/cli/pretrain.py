"""`tvl-align pretrain`: train small Stage-1 encoders."""

from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.synthetic.pretrain import PretrainConfig, pretrain

EXAMPLES = (
    "tvl-align pretrain --datasets_dir world --output_dir stage1",
    "tvl-align pretrain --datasets_dir world --output_dir quick --epochs 2 --device cpu",
)


def run(argv: Sequence[str]) -> None:
    print(pretrain(parse(PretrainConfig, argv, "tvl-align pretrain", examples=EXAMPLES)))
