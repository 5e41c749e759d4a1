"""stage2_matryoshka v1. No dropout: the alignment loss at every prefix of the overlapping registers, in every step.

Averaging over all prefixes beats sampling one (Matryoshka representations, Kusupati et al. 2022, arXiv:2205.13147).
Registers are causal, so a prefix is the same whether or not later registers exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import FeatureSpec, Implementation, Method, Output
from tvl_align.losses.alignment import alignment
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.registers.model import RegisterConfig, RegisterModel


@dataclass(frozen=True)
class MatryoshkaConfig(RegisterConfig):
    """The registers and their loss."""

    nested_dropout_rate: float = 0.0
    """Drop probability of the last register; none are dropped here by default."""
    preservation_weight: float = 1.0
    """Weight of rebuilding the frozen tokens from all registers."""


class Matryoshka(RegisterModel):
    """Causal registers over the token sequences, own blocks per modality."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: MatryoshkaConfig) -> None:
        super().__init__(specs, knobs, causal=True, preservation=knobs.preservation_weight > 0)


class MatryoshkaLoss(RegisterLoss):
    """The pairs' own numbers are those of the longest prefix; `overlapping_loss` is the mean over all prefixes."""

    def align(self, output: Output) -> dict[str, Tensor]:
        tokens = output.overlapping_tokens
        count = next(iter(tokens.values())).shape[1]
        prefixes = [
            alignment({m: F.normalize(z[:, :k].mean(1), dim=-1) for m, z in tokens.items()}, output, self.pairs)
            for k in range(1, count + 1)
        ]
        return prefixes[-1] | {"overlapping_loss": torch.stack([p["overlapping_loss"] for p in prefixes]).mean()}


MATRYOSHKA = Method(
    Implementation("stage2_matryoshka", "1", "MATRYOSHKA"),
    MatryoshkaConfig,
    lambda knobs, specs: Matryoshka(specs, knobs),
    MatryoshkaLoss,
)
