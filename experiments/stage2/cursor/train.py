"""cursor_flux_talk_register_tokens v1. Train it: `torchrun --nproc_per_node=1 train.py --stage1_checkpoint P ...`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])  # this folder would load every module a second time

from tvl_align.cli.train import train_method  # noqa: E402

if __name__ == "__main__":
    train_method("cursor", sys.argv[1:])
