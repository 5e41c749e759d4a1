"""Pooling: overlapping tokens -> one vector per modality, used for alignment and retrieval."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import Output


def pool_kept(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Mean over the kept registers: (..., B, n, D), (B, n) bool -> (..., B, D). kept=None: all are kept."""
    if kept is None:
        return tokens.mean(-2)
    weight = kept[..., None].to(tokens.dtype)
    return (tokens * weight).sum(-2) / weight.sum(-2).clamp(min=1)


def pooled_overlapping(output: Output) -> dict[str, Tensor]:
    """{modality: (B, D)} float32: the L2-normalised mean of the kept overlapping tokens."""
    kept, tokens = output.nested_dropout_mask, torch.stack(list(output.overlapping_tokens.values())).float()
    pooled = pool_kept(tokens, kept[:, : tokens.shape[2]] if kept is not None else None)
    return dict(zip(output.overlapping_tokens, F.normalize(pooled, dim=-1).unbind(0), strict=True))
