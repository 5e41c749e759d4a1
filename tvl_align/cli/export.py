"""`tvl-align export`: write a trained run as a folder to share."""

from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.inference.export import ExportConfig, export

EXAMPLES = (
    "tvl-align export output_dir/mine --out mine --licence mit",
    "tvl-align export output_dir/mine --out mine --checkpoint checkpoint-acc1.pth",
)


def run(argv: Sequence[str]) -> None:
    config = parse(ExportConfig, argv, "tvl-align export", examples=EXAMPLES)
    print(export(config))
