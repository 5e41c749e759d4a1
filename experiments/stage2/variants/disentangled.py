"""stage2_disentangled v2. Its code is tvl_align/methods/disentangled.py."""

from tvl_align.methods.disentangled import DISENTANGLED, Disentangled, DisentangledConfig

__all__ = ["DISENTANGLED", "Disentangled", "DisentangledConfig"]
