"""stage2_disentangled v2. The base without its canonical read-outs, and with three complementary registers.

It shows what registers alone, kept apart by stacks, bottleneck, noise and regressions (tvl_align.separated_model), reach.
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
    """Registers in all."""
    complementary_reg_weight: float = 0.0
    """Weight of the L2 norm and diversity penalty on complementary tokens."""
    canonical: int = 0
    """Canonical variates of an overlapping token; 0: registers alone."""


class Disentangled(SeparatedModel):
    """Registers alone, kept apart."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: DisentangledConfig) -> None:
        super().__init__(specs, knobs)


DISENTANGLED = Method(
    Implementation("stage2_disentangled", "2", "DISENTANGLED"),
    DisentangledConfig,
    lambda knobs, specs: Disentangled(specs, knobs),
    RegisterLoss,
)
