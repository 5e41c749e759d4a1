"""Losses as pure functions of tensors. Each has a slow, obvious twin in tests/reference.py.

Shapes: B local rows, G rows of all processes, D width.
"""

import torch
from torch import Tensor


def positive_mask(keys: Tensor, all_keys: Tensor) -> Tensor:
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


def hits_at_k(queries: Tensor, gallery: Tensor, positives: Tensor, gallery_valid: Tensor, k: int) -> Tensor:
    """(B,) bool: a positive is among the k nearest rows of the gallery (fewer than k candidates: among all)."""
    logits = (queries @ gallery.T).masked_fill(~gallery_valid, -torch.inf)
    nearest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (positives & gallery_valid).gather(1, nearest).any(1)
