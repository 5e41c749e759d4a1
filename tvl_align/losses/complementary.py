"""Norm and diversity penalties on complementary tokens, as pure functions. Leading dimensions (...) are kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.system.distributed import joint_mean, joint_mean_with_grad, world_size


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (..., B, n) where the mask is True, over all processes -> (...). An empty mask gives zero, with zero
    gradients."""
    count = joint_mean(mask.sum((-2, -1), dtype=values.dtype))
    return values.masked_fill(~mask, 0.0).sum((-2, -1)) / count.clamp(min=1 / world_size())


def log_error(errors: Tensor, floor: float) -> Tensor:
    """log(1 + errors / floor) of masked means (...), over all processes; an error of zero gives zero.

    Its gradient is that of the relative error, so that modalities count alike however much of them can be rebuilt: with
    floor 0 it would be the likelihood of a Gaussian with the best variance (Rybkin et al. 2021, arXiv:2006.13202).
    """
    return (joint_mean_with_grad(errors) / floor).log1p()


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
