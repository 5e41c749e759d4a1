"""Pooling: overlapping tokens -> one vector per modality, used for alignment and retrieval."""

import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import Output


def pool_kept(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Mean over the kept registers: (B, n, D), (B, n) bool -> (B, D). kept=None: all are kept."""
    if kept is None:
        return tokens.mean(1)
    weight = kept[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def pooled_overlapping(output: Output) -> dict[str, Tensor]:
    """{modality: (B, D)} float32: the L2-normalised mean of the kept overlapping tokens."""
    kept = output.nested_dropout_mask
    tokens = {m: z.float() for m, z in output.overlapping_tokens.items()}
    return {
        m: F.normalize(pool_kept(z, kept[:, : z.shape[1]] if kept is not None else None), dim=-1) for m, z in tokens.items()
    }
