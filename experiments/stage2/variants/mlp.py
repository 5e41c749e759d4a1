"""stage2_mlp v1. Its code is tvl_align/methods/mlp.py."""

from tvl_align.methods.mlp import MLP, MLPConfig, MLPModel

__all__ = ["MLP", "MLPConfig", "MLPModel"]
