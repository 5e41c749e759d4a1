"""Losses as pure functions of tensors. Each has a slow, obvious twin in tests/reference.py.

Shapes: B local rows, G rows of all processes, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.runtime import mean_count

MAX_LOGIT_SCALE = math.log(100)  # CLIP (Radford et al. 2021, arXiv:2103.00020) clamps the temperature here


def positive_pairs(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(B, K), (G, K) caption keys -> (B, G) bool: True where two rows agree in any column, that is, say the same."""
    found = keys[:, 0, None] == all_keys[None, :, 0]
    for column in range(1, keys.shape[1]):
        found |= keys[:, column, None] == all_keys[None, :, column]
    return found


def info_nce(
    queries: Tensor, gallery: Tensor, scale: Tensor, positives: Tensor, valid: Tensor, gallery_valid: Tensor
) -> Tensor:
    """Sum over the valid queries of the InfoNCE loss with one or more positives each.

    queries (B, D) and gallery (G, D), L2-normalised; scale (): inverse temperature; positives (B, G) bool;
    valid (B,) and gallery_valid (G,) bool: rows that have this modality pair. For one positive this is the
    cross-entropy of CLIP; for several, the mean of their log-probabilities (Khosla et al. 2020, arXiv:2004.11362, eq. 2).
    """
    logits = (scale * queries @ gallery.T).masked_fill(~gallery_valid, -torch.inf)
    positives = positives & gallery_valid
    log_probability = torch.where(positives, logits.log_softmax(1), 0.0)
    per_row = -log_probability.sum(1) / positives.sum(1).clamp(min=1)
    return torch.where(valid, per_row, 0.0).sum()


def batch_hits(queries: Tensor, gallery: Tensor, positives: Tensor, gallery_valid: Tensor, k: int) -> Tensor:
    """(B,) bool: a positive is among the k nearest rows of the gallery (fewer than k candidates: among all)."""
    logits = (queries @ gallery.T).masked_fill(~gallery_valid, -torch.inf)
    nearest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (positives & gallery_valid).gather(1, nearest).any(1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values whose mask is True, over all processes; zero, with gradients, when there are none."""
    count = mean_count(mask.sum(dtype=values.dtype))
    return torch.where(mask, values, 0.0).sum() / torch.where(count > 0, count, 1.0)


def token_norm(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean L2 norm of the kept tokens: (B, n, D), (B, n) -> ()."""
    squared = torch.where(kept[..., None], tokens, 1.0).square().sum(-1)  # sqrt has no gradient at 0
    return masked_mean(squared.sqrt(), kept)


def diversity(tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean squared cosine between different kept tokens of a row: (B, n, D), (B, n) -> (). Zero for a single token.

    The mean over an empty set of pairs is where a naive version turns NaN.
    """
    count = tokens.shape[1]
    if count < 2:
        return tokens.sum() * 0.0
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    return masked_mean(cosine.square(), kept[:, :, None] & kept[:, None, :] & off_diagonal)
