"""Train the base of Stage 2: `torchrun --nproc_per_node=1 main_train_stage2.py --stage1_checkpoint P ...`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this folder would load every module a second time

from tvl_align.cli.train import train_method  # noqa: E402

if __name__ == "__main__":
    train_method("base", sys.argv[1:], "experiments.stage2.methods")
