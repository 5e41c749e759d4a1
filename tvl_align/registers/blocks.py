"""Register blocks: learnable register tokens cross-attend to the frozen tokens of a modality.

A block is pre-norm and has three parts: cross-attention (queries: registers; keys and values: the modality's tokens),
self-attention among the registers (from the second layer on) and an MLP. Sources: Perceiver (Jaegle et al. 2021,
arXiv:2103.03206), registers (Darcet et al. 2023, arXiv:2309.16588).

A dropped register has no effect: it is masked as a key of the self-attention, and its output is zero. Masking only its
query would not be enough, because cross-attention still adds information to it.

Shapes: z (B, N, D) registers, keys (B, T, D), mask (B, T) bool, kept (B, N) bool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec
from tvl_align.system.console import UserError


@dataclass(frozen=True)
class BlockOptions:
    """Size and dropout probabilities of a register block. Raises UserError if `num_heads` does not divide `dim`."""

    dim: int = 768
    num_heads: int = 8
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise UserError(f"register width {self.dim} is not divisible by {self.num_heads} heads; change --num_heads.")


class Attention(nn.Module):
    """Multi-head attention of z (B, N, D) over keys (B, M, D); `mask` (B, M) or (B, N, M) bool, False = ignored.

    With few queries and many keys, the key and value projections are absorbed into the queries, since q (W k) = (q W) k.
    The projections then run on heads * N queries instead of M tokens, and the result is the same (multi-head latent
    attention, DeepSeek-AI 2024, arXiv:2405.04434). The key bias adds the same value to every score of a query, so it has no
    effect. The value bias is added once, because attention weights sum to 1.
    """

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.heads, self.attn_drop = options.num_heads, options.attn_drop_rate
        self.query = nn.Linear(options.dim, options.dim)
        self.key_value = nn.Linear(options.dim, 2 * options.dim)
        self.out = nn.Sequential(nn.Linear(options.dim, options.dim), nn.Dropout(options.drop_rate))

    def forward(self, z: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, M, D) -> (B, N, D)."""
        q = rearrange(self.query(z), "b n (h d) -> b h n d", h=self.heads)
        drop = self.attn_drop if self.training else 0.0
        if mask.ndim == 2 and not drop and self._absorbing_is_cheaper(z.shape[1], keys.shape[1]):
            return self.out(self._absorbed(q, keys, mask))
        k, v = rearrange(self.key_value(keys), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        mask = mask[:, None] if mask.ndim == 3 else mask[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))

    def _absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Compare multiplications per row, divided by 2 D: query projections + wide attention < token projections."""
        dim = self.query.in_features
        return queries * (dim + keys * self.heads) < keys * dim

    def _absorbed(self, q: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """q (B, H, N, d), keys (B, M, D), mask (B, M) -> (B, N, D), before the output projection."""
        to_key, to_value = rearrange(self.key_value.weight, "(two h d) w -> two h d w", two=2, h=self.heads)
        wide_queries = torch.einsum("bhnd,hdw->bhnw", q, to_key).flatten(1, 2)[:, None]
        tokens, scale = keys[:, None], q.shape[-1] ** -0.5
        attended = F.scaled_dot_product_attention(wide_queries, tokens, tokens, attn_mask=mask[:, None, None], scale=scale)
        values = torch.einsum("bhnw,hdw->bhnd", attended.squeeze(1).unflatten(1, (self.heads, -1)), to_value)
        return rearrange(values, "b h n d -> b n (h d)") + self.key_value.bias.chunk(2)[1]


class RegisterBlock(nn.Module):
    """Cross-attention, optional self-attention, MLP, each with a residual connection.

    The first layer needs no self-attention: its registers do not depend on the input yet.
    """

    def __init__(self, options: BlockOptions, self_attention: bool) -> None:
        super().__init__()
        self.cross_norm, self.cross = nn.LayerNorm(options.dim), Attention(options)
        self.self_norm = nn.LayerNorm(options.dim) if self_attention else None
        self.self_attention = Attention(options) if self_attention else None
        self.mlp_norm = nn.LayerNorm(options.dim)
        self.mlp = Mlp(options.dim, int(options.dim * options.mlp_ratio), drop=options.drop_rate)
        self.drop_path = DropPath(options.drop_path_rate)

    def forward(self, z: Tensor, keys: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); `mask` applies to the keys, `kept` (B, N) or (B, N, N) to the registers."""
        z = z + self.drop_path(self.cross(self.cross_norm(z), keys, mask))
        if self.self_attention is not None and self.self_norm is not None:
            normed = self.self_norm(z)
            z = z + self.drop_path(self.self_attention(normed, normed, kept))
        return z + self.drop_path(self.mlp(self.mlp_norm(z)))


class KeyProjection(nn.Module):
    """Frozen tokens (B, T, W) -> keys (B, T, D): LayerNorm, a linear projection if W != D, learned position embeddings."""

    def __init__(self, spec: FeatureSpec, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width)
        self.project = nn.Linear(spec.width, dim) if spec.width != dim else nn.Identity()
        self.positions = nn.Parameter(torch.randn(spec.tokens, dim) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.norm(tokens)) + self.positions[: tokens.shape[1]]


class RegisterStack(nn.Module):
    """A stack of `layers` register blocks with a final LayerNorm, for a group of `registers` registers.

    causal: a register attends only to itself and to earlier registers. A group of one register has no self-attention: the
    softmax over its single key is 1, so the query and key weights would never get a gradient.
    """

    def __init__(self, options: BlockOptions, layers: int, registers: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(RegisterBlock(options, self_attention=i > 0 and registers > 1) for i in range(layers))
        self.norm = nn.LayerNorm(options.dim)

    def forward(self, registers: Tensor, keys: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        """registers (N, D) -> (B, N, D); dropped registers are zero."""
        return attend_jointly([self], registers, [keys], [mask], kept, [mask.any(1)])


def attend_jointly(
    stacks: Sequence[RegisterStack],
    registers: Tensor,
    keys: Sequence[Tensor],
    masks: Sequence[Tensor],
    kept: Tensor,
    present: Sequence[Tensor],
) -> Tensor:
    """Let registers (N, D) attend to several modalities at once -> (B, N, D); dropped registers are zero.

    Each layer applies the block of every present modality and averages the results. With one modality this equals that
    modality's stack. stacks, keys (B, T, D), masks (B, T) and present (B,) bool: one per modality.
    """
    batch = len(keys[0])
    z = registers.expand(batch, *registers.shape)
    weights = torch.stack([p.to(z.dtype) for p in present])
    weights = (weights / weights.sum(0).clamp(min=1))[..., None, None]
    # A row without any key would give NaN. It attends to all keys instead, and its result has weight 0.
    safe_masks = [mask | ~mask.any(1, keepdim=True) for mask in masks]
    self_mask = kept | ~kept.any(1, keepdim=True)  # the same for a row without any kept register
    if stacks[0].causal:
        causal = torch.ones(kept.shape[1], kept.shape[1], dtype=torch.bool, device=kept.device).tril()
        self_mask = self_mask[:, None, :] & causal
    for layer in range(len(stacks[0].blocks)):
        updates = [
            weight * stack.blocks[layer](z, key, mask, self_mask)
            for stack, key, mask, weight in zip(stacks, keys, safe_masks, weights, strict=True)
        ]
        z = torch.stack(updates).sum(0) if len(updates) > 1 else updates[0]
    normed = [weight * stack.norm(z) for stack, weight in zip(stacks, weights, strict=True)]
    z = torch.stack(normed).sum(0) if len(normed) > 1 else normed[0]
    return z * kept[..., None].to(z.dtype)
