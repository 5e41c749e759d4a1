"""Reconstruction of the frozen tokens from the registers: a decoder and its error."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec, Reconstruction
from tvl_align.registers.blocks import BlockOptions, RegisterBlock


class TokenDecoder(nn.Module):
    """Reconstructs a modality's frozen tokens (B, T, W) from its registers (B, N, D).

    One learned query per position cross-attends to the registers. The decoder is narrow, so the registers themselves must
    hold the information in an easily decoded form.
    """

    def __init__(self, spec: FeatureSpec, dim: int, width: int = 256) -> None:
        super().__init__()
        width = min(width, dim)
        options = BlockOptions(width, num_heads=max(1, width // 64), mlp_ratio=2.0)
        self.read = nn.Linear(dim, width)
        self.queries = nn.Parameter(torch.randn(spec.tokens, width) * 0.02)
        self.block = RegisterBlock(options, self_attention=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, spec.width))

    def forward(self, z: Tensor, kept: Tensor, length: int) -> Tensor:
        """Registers (B, N, D), kept (B, N) bool -> the first `length` tokens (B, length, W)."""
        keys = self.read(z)
        queries = self.queries[:length].expand(len(z), -1, -1)
        return self.out(self.block(queries, keys, kept, kept))


def reconstruction_error(reconstructed: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
    """Mean squared error per token, (B, T).

    The target is the frozen tokens (B, T, W), standardised over their width. mask (B, T) bool, True = a real token.
    """
    return Reconstruction((reconstructed - F.layer_norm(tokens, tokens.shape[-1:])).square().mean(-1), mask)
