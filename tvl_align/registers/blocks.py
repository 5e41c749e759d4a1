"""Register blocks: learnable register tokens cross-attend to the frozen tokens of a modality.

A block is pre-norm and has three parts: cross-attention (queries: registers; keys and values: the modality's tokens),
self-attention among the registers (from the second layer on) and an MLP. Sources: Perceiver (Jaegle et al. 2021,
arXiv:2103.03206), registers (Darcet et al. 2023, arXiv:2309.16588).

A dropped register has no effect: it is masked as a key of the self-attention, and its output is zero. Masking only its
query would not be enough, because cross-attention still adds information to it. The model zeroes the outputs.

Shapes: G modalities with blocks of their own (tvl_align.registers.copies), z (G, B, N, D) registers, keys (G, B, T, D), mask
(G, B, T) bool, kept (B, N) bool. With one copy of the blocks, G modalities share it. Registers that are the same in all
rows, as in the first layer, are (G, 1, N, D), and are projected once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec
from tvl_align.registers.copies import Linears, Mlps, Norms
from tvl_align.system.console import UserError

NARROW = 256  # widths up to this gain nothing from absorbed projections


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
    """Multi-head attention of z (G, B, N, D) over keys (G, B, M, D) -> (G, B, N, D).

    mask (G, B, M) or (G, B, N, M), added to the scores: -inf = ignored; None: all keys are seen.

    With few queries and many keys, the key and value projections are absorbed into the queries, since q (W k) = (q W) k.
    The projections then run on heads * N queries instead of M tokens, and the result is the same (multi-head latent
    attention, DeepSeek-AI 2024, arXiv:2405.04434). The key bias adds the same value to every score of a query, so it has no
    effect. The value bias is added once, because attention weights sum to 1.
    """

    def __init__(self, options: BlockOptions, copies: int = 1) -> None:
        super().__init__()
        self.heads, self.attn_drop = options.num_heads, options.attn_drop_rate
        self.query = Linears(copies, options.dim, options.dim)
        self.key_value = Linears(copies, options.dim, 2 * options.dim)
        self.out = nn.Sequential(Linears(copies, options.dim, options.dim), nn.Dropout(options.drop_rate))

    def forward(self, z: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        q = rearrange(self.query(z), "g b n (h d) -> g b h n d", h=self.heads)
        drop = self.attn_drop if self.training else 0.0
        per_query = mask is not None and mask.ndim == 4
        if mask is not None:
            mask = mask.expand(*keys.shape[:2], *mask.shape[2:]).flatten(0, 1)
            mask = mask[:, None] if per_query else mask[:, None, None]
        if not per_query and not drop and self._absorbing_is_cheaper(z, keys):
            return self.out(self._absorbed(q, keys, mask))
        k, v = rearrange(self.key_value(keys), "g b m (two h d) -> two (g b) h m d", two=2, h=self.heads)
        q = q.expand(*keys.shape[:2], *q.shape[2:]).flatten(0, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.out(rearrange(attended, "(g b) h n d -> g b n (h d)", g=len(keys)))

    def _absorbing_is_cheaper(self, z: Tensor, keys: Tensor) -> bool:
        """Compare multiplications per row, divided by 2 D: query projections + wide attention < token projections.

        Registers that are the same in all rows are projected once. On a GPU heads as wide as the tokens have no fast kernel,
        and narrow tokens are projected faster than the calls for it take.
        """
        dim, queries, tokens = z.shape[-1], z.shape[-2], keys.shape[-2]
        if z.is_cuda or dim <= NARROW:
            return False
        projections = dim if z.shape[1] == keys.shape[1] else dim / 2
        return queries * (projections + tokens * self.heads) < tokens * dim

    def _absorbed(self, q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """q (G, B, H, N, d), keys (G, B, M, D), mask (G * B, 1, 1, M) -> (G, B, N, D), before the output projection."""
        copies, rows, (heads, queries) = len(self.key_value.weight), keys.shape[:2], q.shape[2:4]
        to_key, to_value = rearrange(self.key_value.weight, "c w (two h d) -> two c h d w", two=2, h=heads)
        bias = self.key_value.bias.chunk(2, dim=1)[1]
        wide = torch.einsum("cbhnd,chdw->cbhnw", q if copies > 1 else q.flatten(0, 1)[None], to_key)
        wide = wide.reshape(*q.shape[:2], heads * queries, -1).expand(*rows, -1, -1).flatten(0, 1)[:, None]
        tokens, scale = keys.flatten(0, 1)[:, None], q.shape[-1] ** -0.5
        attended = F.scaled_dot_product_attention(wide, tokens, tokens, attn_mask=mask, scale=scale)
        attended = attended.view(copies, -1, heads, queries, attended.shape[-1])
        values = torch.einsum("cbhnw,chdw->cbnhd", attended, to_value).flatten(-2) + bias[:, None, None]
        return values.reshape(*rows, queries, -1)


class RegisterBlock(nn.Module):
    """Cross-attention, optional self-attention, MLP, each with a residual connection.

    The first layer needs no self-attention: its registers do not depend on the input yet.
    """

    def __init__(self, options: BlockOptions, self_attention: bool, copies: int = 1) -> None:
        super().__init__()
        dim = options.dim
        self.cross_norm, self.cross = Norms(copies, dim), Attention(options, copies)
        self.self_norm = Norms(copies, dim) if self_attention else None
        self.self_attention = Attention(options, copies) if self_attention else None
        self.mlp_norm = Norms(copies, dim)
        self.mlp = Mlps(copies, dim, int(dim * options.mlp_ratio), drop=options.drop_rate)
        self.drop_path_rate = options.drop_path_rate

    def forward(self, z: Tensor, keys: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
        """z (G, B or 1, N, D) -> (G, B, N, D); `mask` applies to the keys, `kept` to the registers, see `Attention`."""
        z = z + self._drop_path(self.cross(self.cross_norm(z), keys, mask))
        if self.self_attention is not None and self.self_norm is not None:
            normed = self.self_norm(z)
            z = z + self._drop_path(self.self_attention(normed, normed, kept))
        return z + self._drop_path(self.mlp(self.mlp_norm(z)))

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): whole branches of a row and modality are zero."""
        if not self.training or not self.drop_path_rate:
            return branch
        kept = torch.rand(*branch.shape[:2], 1, 1, device=branch.device) >= self.drop_path_rate
        return branch * kept / (1 - self.drop_path_rate)


class KeyProjection(nn.Module):
    """Frozen tokens (G, B, T, W) -> keys (G, B, T, D): LayerNorm, a linear projection if W != D, learned positions."""

    def __init__(self, spec: FeatureSpec, dim: int, copies: int = 1) -> None:
        super().__init__()
        self.norm = Norms(copies, spec.width)
        self.project = Linears(copies, spec.width, dim) if spec.width != dim else nn.Identity()
        self.positions = nn.Parameter(torch.randn(copies, spec.tokens, dim) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.norm(tokens)) + self.positions[:, None, : tokens.shape[2]]


class RegisterStack(nn.Module):
    """A stack of `layers` register blocks with a final LayerNorm, for a group of `registers` registers.

    causal: a register attends only to itself and to earlier registers. A group of one register has no self-attention: the
    softmax over its single key is 1, so the query and key weights would never get a gradient. copies: modalities with
    weights of their own; 1: all modalities share them.
    """

    def __init__(self, options: BlockOptions, layers: int, registers: int, causal: bool = False, copies: int = 1) -> None:
        super().__init__()
        self.causal = causal
        self.blocks = nn.ModuleList(
            RegisterBlock(options, self_attention=i > 0 and registers > 1, copies=copies) for i in range(layers)
        )
        self.norm = Norms(copies, options.dim)

    def forward(self, registers: Tensor, keys: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
        """Let registers (N, D) attend to each of G modalities -> (G, B, N, D).

        Results of dropped registers, and of rows without any key, are of no use. mask: (G, B, T), or (G, B, 1) for whole
        rows.
        """
        seen = visible(mask)[1]
        among = self.self_mask(kept, len(registers), len(keys))
        z = registers.expand(len(keys), 1, *registers.shape)
        for block in self.blocks:
            z = block(z, keys, seen, among)
        return self.norm(z).expand(*keys.shape[:2], -1, -1)

    def self_mask(self, kept: Tensor | None, registers: int, modalities: int) -> Tensor | None:
        """Which registers see which others, as `Attention` takes it; None: all, or there is no self-attention."""
        if len(self.blocks) < 2 or registers < 2 or (kept is None and not self.causal):
            return None
        device = self.norm.weight.device
        mask = torch.ones(1, registers, dtype=torch.bool, device=device) if kept is None else kept
        mask = mask | ~mask.any(1, keepdim=True)  # a row without any key would give NaN; its result is zero anyway
        if self.causal:
            mask = mask[:, None] & torch.ones(registers, registers, dtype=torch.bool, device=device).tril()
        return additive(mask).expand(modalities, *mask.shape)


def additive(mask: Tensor) -> Tensor:
    """A bool mask as attention adds it to scores: 0 or -inf. Made once for all layers."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def visible(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which rows have a key, (G, B), and which keys are seen, as `Attention` takes it; None: all.

    A row without any key would give NaN: it sees all keys, and its result is not used. mask: (G, B, T) bool, or (G, B, 1)
    for whole rows.
    """
    if mask.shape[-1] == 1:
        return mask.squeeze(-1), None
    present = mask.any(-1)
    return present, additive(mask | ~present[..., None])


def attend_jointly(
    stacks: Sequence[RegisterStack], registers: Tensor, keys: Sequence[Tensor], masks: Sequence[Tensor], kept: Tensor
) -> Tensor:
    """Let registers (N, D) attend to all modalities at once -> (B, N, D); dropped registers are zero.

    stacks, keys, masks: one for each set of modalities, as for RegisterStack.forward. Each layer applies the block of every
    present modality and averages the results. With one modality this equals that modality's stack.
    """
    seen = [visible(mask) for mask in masks]
    total = torch.stack([present.sum(0) for present, _ in seen]).sum(0).clamp(min=1)  # (B,)
    weights = [(present / total)[..., None, None].to(registers.dtype) for present, _ in seen]
    among = [stack.self_mask(kept, len(registers), len(k)) for stack, k in zip(stacks, keys, strict=True)]
    z = registers.expand(len(kept), *registers.shape)

    def averaged(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([(w * part).sum(0) for w, part in zip(weights, parts, strict=True)]).sum(0)

    def each(z: Tensor) -> list[Tensor]:
        return [z.expand(len(k), *z.shape) for k in keys]

    for layer in range(len(stacks[0].blocks)):
        of_sets = zip(stacks, each(z), keys, seen, among, strict=True)
        z = averaged([stack.blocks[layer](x, k, mask, own) for stack, x, k, (_, mask), own in of_sets])
    z = averaged([stack.norm(x) for stack, x in zip(stacks, each(z), strict=True)])
    return z * kept[..., None].to(z.dtype)
