"""Reconstruction of the frozen tokens from the registers: a decoder and its error."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec, Reconstruction
from tvl_align.registers.blocks import BlockOptions, RegisterBlock, additive
from tvl_align.registers.copies import Linears, Norms


class TokenDecoder(nn.Module):
    """Reconstructs the frozen tokens (G, B, T, W) of modalities from their registers (G, B, N, D).

    One learned query per position cross-attends to the registers. The decoder is narrow, so the registers themselves must
    hold the information in an easily decoded form. copies: G, modalities of the same shape with weights of their own.
    """

    def __init__(self, spec: FeatureSpec, dim: int, width: int = 256, copies: int = 1) -> None:
        super().__init__()
        width = min(width, dim)
        options = BlockOptions(width, num_heads=max(1, width // 64), mlp_ratio=2.0)
        self.read = Linears(copies, dim, width)
        self.queries = nn.Parameter(torch.randn(copies, spec.tokens, width) * 0.02)
        self.block = RegisterBlock(options, self_attention=False, copies=copies)
        self.norm, self.out = Norms(copies, width), Linears(copies, width, spec.width)

    def forward(self, z: Tensor, kept: Tensor, length: int) -> Tensor:
        """Registers (G, B, N, D), kept (B, N) bool -> the first `length` tokens (G, B, length, W)."""
        queries = self.queries[:, None, :length]
        return self.out(self.norm(self.block(queries, self.read(z), additive(kept).expand(len(z), *kept.shape), None)))


def reconstruction_error(reconstructed: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
    """Mean squared error per token, (..., B, T).

    The target is the frozen tokens (..., B, T, W), standardised over their width. mask (..., B, T) bool, True = a token.
    """
    return Reconstruction((reconstructed - F.layer_norm(tokens, tokens.shape[-1:])).square().mean(-1), mask)
