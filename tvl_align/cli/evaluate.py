"""`tvl-align evaluate`: evaluate a run, print the main metrics, write results.json and report.html."""

from collections.abc import Sequence

from tvl_align.config import parse
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.report.page import print_table, write_page

EXAMPLES = (
    "tvl-align evaluate output_dir/mine",
    "tvl-align evaluate output_dir/mine --split val --labels factors.csv --checkpoint checkpoint-acc1.pth",
)


def run(argv: Sequence[str]) -> None:
    config = parse(EvaluateConfig, argv, "tvl-align evaluate", examples=EXAMPLES)
    results = measure(config)
    print_table(results)
    print(write_page(config.run) if config.split == "test" else results)
