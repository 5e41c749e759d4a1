"""The flags of a method -> a trained run: what every entry calls."""

import logging
import sys
from collections.abc import Sequence

import torch

from experiments.stage2.engine_stage2 import fit
from experiments.stage2.methods import METHODS
from tvl_align.config import Settings, parse
from tvl_align.console import says_it_plainly


@says_it_plainly
def train_method(name: str, argv: Sequence[str] | None = None) -> None:
    """Parse the flags of a method (default: this process's own) and train it."""
    quiet_logs()
    method = METHODS[name]
    settings = parse(Settings[method.knobs], argv)
    try:
        fit(settings, method)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def quiet_logs() -> None:
    """Warnings on stderr, without the one that is no news: encoders get their weights after they are made."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
