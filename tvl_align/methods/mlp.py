"""stage2_mlp v1. A two-layer MLP per modality on principal components, trained by InfoNCE with noise. A baseline.

It has no registers and no complementary information: complementary tokens are zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tvl_align.contract import FeatureSpec, Implementation, Method
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.methods.codes import CodeConfig
from tvl_align.methods.direct import DirectModel
from tvl_align.system.bounds import at_least


@dataclass(frozen=True)
class MLPConfig(CodeConfig):
    """The registers and their loss."""

    nested_dropout_rate: float = 0.0
    """Drop probability of the last register; by default no register is dropped."""
    complementary_reg_weight: float = 0.0
    """Weight of the L2-norm and diversity penalties on complementary tokens."""
    hidden: int = 768
    """Hidden width of the MLPs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "hidden")


class MLPModel(DirectModel):
    """An MLP with one hidden layer per modality; its outputs are the units of all overlapping tokens."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: MLPConfig) -> None:
        super().__init__(specs, knobs)
        self.registers.requires_grad_(False)
        self.mlps = nn.ModuleDict(
            {
                m: nn.Sequential(nn.Linear(k, knobs.hidden), nn.GELU(), nn.Linear(knobs.hidden, sum(self.codes.counts)))
                for m, k in self.codes.principal.sizes.items()
            }
        )

    def units_of(self, name: str, components: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlps[name](components), components.new_zeros(len(components), sum(self.codes.comp_counts))


MLP = Method(
    Implementation("stage2_mlp", "1", "MLP"),
    MLPConfig,
    lambda knobs, specs: MLPModel(specs, knobs),
    RegisterLoss,
    recordable=True,
)
