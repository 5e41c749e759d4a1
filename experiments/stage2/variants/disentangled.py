"""stage2_disentangled v8.0. Its code is tvl_align/methods/disentangled.py."""

from tvl_align.methods.disentangled import DISENTANGLED, DisentangledConfig

__all__ = ["DISENTANGLED", "DisentangledConfig"]
