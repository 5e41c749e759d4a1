"""stage2_flextok v1. Many causal registers, prefixes of 1, 2, 4, ... 32, and a decoder that rebuilds from any of them.

After FlexTok (Bachmann et al. 2025, arXiv:2502.13967): per sample one prefix length is drawn, a power of two, and the
outputs after it are masked. The first 8 registers are aligned across modalities, the other 24 are complementary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tvl_align.contract import FeatureSpec, Implementation, Method
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.registers.model import RegisterConfig, RegisterModel


@dataclass(frozen=True)
class FlexTokConfig(RegisterConfig):
    """The registers and their loss."""

    num_register_tokens: int = 32
    """Registers in all."""
    num_overlapping_tokens: int = 8
    """The first so many registers are aligned across modalities; the rest is complementary."""
    nested_dropout_rate: float = 1.0
    """Share of samples for which a prefix is drawn; the others keep every register."""
    preservation_weight: float = 1.0
    """Weight of rebuilding the frozen tokens from the kept registers."""


class FlexTok(RegisterModel):
    """Causal registers over the token sequences, own blocks per modality."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: FlexTokConfig) -> None:
        super().__init__(specs, knobs, causal=True, preservation=knobs.preservation_weight > 0)

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        count = len(self.registers)
        powers = torch.tensor([min(2**i, count) for i in range((count - 1).bit_length() + 1)])
        lengths = powers[torch.randint(len(powers), (batch, 1), generator=generator)]
        whole = torch.rand(batch, 1, generator=generator) >= self.nested_rate
        return torch.arange(count) < torch.where(whole, count, lengths)


FLEXTOK = Method(
    Implementation("stage2_flextok", "1", "FLEXTOK"),
    FlexTokConfig,
    lambda knobs, specs: FlexTok(specs, knobs),
    RegisterLoss,
)
