"""stage2_flextok v1.1. 32 causal registers, prefixes of 1, 2, 4, ... 32, and a decoder that reconstructs from any prefix.

After FlexTok (Bachmann et al. 2025, arXiv:2502.13967): for each sample one prefix length, a power of two, is drawn, and the
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
    """Number of registers."""
    num_overlapping_tokens: int = 8
    """Number of leading registers that are aligned across modalities; the rest are complementary."""
    nested_dropout_rate: float = 1.0
    """Fraction of samples for which a prefix is drawn; the others keep all registers."""
    preservation_weight: float = 1.0
    """Weight of the error of reconstructing the frozen tokens from the kept registers."""


class FlexTok(RegisterModel):
    """Causal registers over the token sequences, with separate blocks per modality."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: FlexTokConfig) -> None:
        super().__init__(specs, knobs, causal=True, preservation=knobs.preservation_weight > 0)

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) bool: a prefix whose length is a uniformly drawn power of two, capped at N."""
        count = len(self.registers)
        powers = torch.tensor([min(2**i, count) for i in range((count - 1).bit_length() + 1)])
        lengths = powers[torch.randint(len(powers), (batch, 1), generator=generator)]
        whole = torch.rand(batch, 1, generator=generator) >= self.nested_rate
        return torch.arange(count) < torch.where(whole, count, lengths)


FLEXTOK = Method(
    Implementation("stage2_flextok", "1.1", "FLEXTOK"),
    FlexTokConfig,
    lambda knobs, specs: FlexTok(specs, knobs),
    RegisterLoss,
    recordable=True,
)
