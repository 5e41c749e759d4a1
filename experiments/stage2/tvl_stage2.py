"""stage2_base v8.0. TVLStage2, the base model; its code is tvl_align/methods/base.py."""

from tvl_align.methods.base import Stage2Config, TVLStage2

__all__ = ["Stage2Config", "TVLStage2"]
