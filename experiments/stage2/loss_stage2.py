"""stage2_base v8.0. Stage2Loss, the loss of the base; its code is tvl_align/methods/base.py."""

from tvl_align.methods.base import Stage2Loss

__all__ = ["Stage2Loss"]
