"""Norm and diversity penalties on complementary tokens, as pure functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.system.distributed import mean_count


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where mask is True, over all processes -> (). If the mask is empty: zero, with zero gradients."""
    count = mean_count(mask.sum(dtype=values.dtype))
    return torch.where(mask, values, 0.0).sum() / torch.where(count > 0, count, 1.0)


def token_norm(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean L2 norm of the kept tokens: (B, n, D), (B, n) bool -> ()."""
    squared = torch.where(kept[..., None], tokens, 1.0).square().sum(-1)  # the gradient of sqrt at 0 is infinite
    return masked_mean(squared.clamp(min=1e-12).sqrt(), kept)  # so is it for a token that is exactly zero


def diversity(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean squared cosine similarity between different kept tokens of a row: (B, n, D), (B, n) bool -> ().

    With a single token there are no pairs, and the result is zero instead of NaN.
    """
    count = tokens.shape[1]
    if count < 2:
        return tokens.sum() * 0.0
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    return masked_mean(cosine.square(), kept[:, :, None] & kept[:, None, :] & off_diagonal)
