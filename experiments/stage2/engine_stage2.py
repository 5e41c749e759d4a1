"""The one training loop, for every method; its code is tvl_align/training/engine.py."""

from tvl_align.training.engine import calibrate, evaluate, fit, train_one_epoch

__all__ = ["calibrate", "evaluate", "fit", "train_one_epoch"]
