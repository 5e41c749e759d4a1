"""stage2_disentangled v8.0. The base without linear projections: codes of registers alone. An ablation."""

from dataclasses import dataclass

from tvl_align.contract import Implementation, Method
from tvl_align.methods.base import BaseLoss, Stage2Config, TVLStage2


@dataclass(frozen=True)
class DisentangledConfig(Stage2Config):
    """The registers and their loss."""

    linear: bool = False
    """Add linear projections to what registers have attended to."""


DISENTANGLED = Method(
    Implementation("stage2_disentangled", "8.0", "DISENTANGLED"), DisentangledConfig, TVLStage2.of, BaseLoss, recordable=True
)
