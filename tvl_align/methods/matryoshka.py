"""stage2_matryoshka v1.1. No dropout: every step averages the alignment loss over all prefixes of the overlapping registers.

After Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147), which averages over all prefixes instead
of sampling one. Registers are causal, so a prefix does not depend on later registers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tvl_align.contract import FeatureSpec, Implementation, Method, Output
from tvl_align.losses.alignment import prefix_alignment
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.registers.model import RegisterConfig, RegisterModel


@dataclass(frozen=True)
class MatryoshkaConfig(RegisterConfig):
    """The registers and their loss."""

    nested_dropout_rate: float = 0.0
    """Drop probability of the last register; by default no register is dropped."""
    preservation_weight: float = 1.0
    """Weight of the error of reconstructing the frozen tokens from all registers."""


class Matryoshka(RegisterModel):
    """Causal registers over the token sequences, with separate blocks per modality."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: MatryoshkaConfig) -> None:
        super().__init__(specs, knobs, causal=True, preservation=knobs.preservation_weight > 0)


class MatryoshkaLoss(RegisterLoss):
    """`overlapping_loss` is the mean over all prefixes; the metrics of each pair are those of the longest prefix."""

    def align(self, output: Output) -> dict[str, Tensor]:
        count = next(iter(output.overlapping_tokens.values())).shape[1]
        prefixes = {m: tokens.cumsum(1) for m, tokens in output.overlapping_tokens.items()}
        return prefix_alignment(prefixes, output, self.pairs, [1 / count] * count)


MATRYOSHKA = Method(
    Implementation("stage2_matryoshka", "1.1", "MATRYOSHKA"),
    MatryoshkaConfig,
    lambda knobs, specs: Matryoshka(specs, knobs),
    MatryoshkaLoss,
    recordable=True,
)
