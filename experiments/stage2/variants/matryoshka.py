"""stage2_matryoshka v1. No dropout: the alignment loss at every prefix of the overlapping registers, in every step.

Averaging over all prefixes beats sampling one (Matryoshka representations, Kusupati et al. 2022, arXiv:2205.13147).
Registers are causal, so a prefix is the same whether or not later registers exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.alignment import active_pairs, alignment, total
from tvl_align.config import RegisterConfig
from tvl_align.contract import FeatureSpec, Output
from tvl_align.register_model import RegisterModel


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
        super().__init__(
            specs,
            knobs.block,
            knobs.num_register_tokens,
            knobs.num_overlapping_tokens,
            knobs.num_cross_attn_layers,
            knobs.nested_dropout_rate,
            knobs.nested_dropout_mode,
            causal=True,
            preservation=knobs.preservation_weight > 0,
        )


class MatryoshkaLoss(nn.Module):
    """total = mean over prefixes of the alignment + weights x (complementary_reg, preservation).

    The pairs' own numbers are those of the longest prefix; `overlapping_loss` is the mean over all of them.
    """

    def __init__(self, knobs: MatryoshkaConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.pairs = active_pairs(modalities, knobs.disable_vision_text_loss, knobs.disable_tactile_text_loss)
        self.reg_weight, self.preservation_weight = knobs.complementary_reg_weight, knobs.preservation_weight

    def forward(self, output: Output) -> dict[str, Tensor]:
        tokens = output["overlapping_tokens"]
        count = next(iter(tokens.values())).shape[1]
        prefixes = [
            alignment({m: F.normalize(z[:, :k].mean(1), dim=-1) for m, z in tokens.items()}, output, self.pairs)
            for k in range(1, count + 1)
        ]
        numbers = prefixes[-1] | {"overlapping_loss": torch.stack([p["overlapping_loss"] for p in prefixes]).mean()}
        return total(numbers, output, self.reg_weight, self.preservation_weight)
