"""stage2_disentangled v3.1. The base without linear projections: registers alone. An ablation."""

from dataclasses import dataclass

from tvl_align.contract import Implementation, Method
from tvl_align.methods.base import BaseLoss, Stage2Config, TVLStage2


@dataclass(frozen=True)
class DisentangledConfig(Stage2Config):
    """The registers and their loss."""

    linear: bool = False
    """Add linear projections that start at the closed forms to what registers attend to."""


DISENTANGLED = Method(
    Implementation("stage2_disentangled", "3.1", "DISENTANGLED"), DisentangledConfig, TVLStage2.of, BaseLoss
)
