"""Norm and diversity penalties on complementary tokens, as pure functions. Leading dimensions (...) are kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.system.distributed import mean_count, world_size


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (..., B, n) where the mask is True, over all processes -> (...). An empty mask gives zero, with zero
    gradients."""
    count = mean_count(mask.sum((-2, -1), dtype=values.dtype))
    return values.masked_fill(~mask, 0.0).sum((-2, -1)) / count.clamp(min=1 / world_size())


def token_norm(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean L2 norm of the kept tokens: (..., B, n, D), (..., B, n) bool -> (...). A token of zeros has a zero gradient."""
    return masked_mean(torch.linalg.vector_norm(tokens, dim=-1), kept)


def diversity(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean squared cosine similarity between different kept tokens of a row: (..., B, n, D), (..., B, n) bool -> (...).

    With a single token there are no pairs, and the result is zero instead of NaN.
    """
    count = tokens.shape[-2]
    if count < 2:
        return tokens.sum((-3, -2, -1)) * 0.0
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.mT
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    both = kept[..., :, None] & kept[..., None, :] & off_diagonal
    return masked_mean(cosine.square().flatten(-2), both.flatten(-2))
