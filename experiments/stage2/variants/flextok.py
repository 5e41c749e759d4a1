"""stage2_flextok v1.1. Its code is tvl_align/methods/flextok.py."""

from tvl_align.methods.flextok import FLEXTOK, FlexTok, FlexTokConfig

__all__ = ["FLEXTOK", "FlexTok", "FlexTokConfig"]
