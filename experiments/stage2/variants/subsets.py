"""stage2_subsets v1.0. Its code is tvl_align/methods/subsets.py."""

from tvl_align.methods.subsets import SUBSETS, SubsetsConfig

__all__ = ["SUBSETS", "SubsetsConfig"]
