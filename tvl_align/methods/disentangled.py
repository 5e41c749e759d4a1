"""stage2_disentangled v2. The base without canonical projections (CCA) and with three complementary registers.

An ablation: registers alone, separated by block stacks, bottleneck, noise and regressions (tvl_align.methods.separated).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tvl_align.contract import FeatureSpec, Implementation, Method
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.methods.separated import SeparatedConfig, SeparatedModel


@dataclass(frozen=True)
class DisentangledConfig(SeparatedConfig):
    """The registers and their loss."""

    num_register_tokens: int = 6
    """Number of registers."""
    complementary_reg_weight: float = 0.0
    """Weight of the L2-norm and diversity penalties on complementary tokens."""
    canonical: int = 0
    """Canonical variates per overlapping token; 0: no canonical projections."""


class Disentangled(SeparatedModel):
    """SeparatedModel with `canonical=0` by default."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: DisentangledConfig) -> None:
        super().__init__(specs, knobs)


DISENTANGLED = Method(
    Implementation("stage2_disentangled", "2", "DISENTANGLED"),
    DisentangledConfig,
    lambda knobs, specs: Disentangled(specs, knobs),
    RegisterLoss,
)
