"""Contrastive losses as pure functions of tensors. Slow reference implementations are in tests/reference.py.

Shapes: B local rows, G rows of all processes, D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def keys_of(modalities: tuple[str, ...], caption_keys: Tensor, content_keys: Mapping[str, Tensor]) -> Tensor | None:
    """(B, K) int64 keys of the content of the named modalities, for `positive_mask`; None: all rows differ.

    For a pair of modalities, rows with the same content in either are positives of each other. caption_keys (B, K') and
    content_keys {modality: (B,)} are those of Features: captions count where text is named.
    """
    columns = [caption_keys] if "text" in modalities else []
    columns += [content_keys[m][:, None] for m in modalities if m in content_keys]
    return torch.cat(columns, dim=1) if columns else None


def positive_mask(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(B, K), (G, K) int64 keys -> (B, G) bool: True where two rows have the same key in any column."""
    positives = keys[:, 0, None] == all_keys[None, :, 0]
    for column in range(1, keys.shape[1]):
        positives |= keys[:, column, None] == all_keys[None, :, column]
    return positives


def info_nce(
    queries: Tensor, gallery: Tensor, scale: Tensor, positives: Tensor, valid: Tensor, gallery_valid: Tensor
) -> Tensor:
    """InfoNCE loss with one or more positives per query, summed over the valid queries -> ().

    queries (B, D) and gallery (G, D), L2-normalised; scale (): inverse temperature; positives (B, G) bool;
    valid (B,) and gallery_valid (G,) bool: rows that have both modalities of the pair. With one positive this is the
    cross-entropy of CLIP. With several it averages their log-probabilities (Khosla et al. 2020, arXiv:2004.11362, eq. 2).
    """
    logits = (scale * queries @ gallery.T).masked_fill(~gallery_valid, -torch.inf)
    positives = positives & gallery_valid
    log_probability = torch.where(positives, logits.log_softmax(1), 0.0)
    per_row = -log_probability.sum(1) / positives.sum(1).clamp(min=1)
    return torch.where(valid, per_row, 0.0).sum()


def hits_at_k(queries: Tensor, gallery: Tensor, positives: Tensor, gallery_valid: Tensor, k: int) -> Tensor:
    """(B,) bool: True if a positive is among the k most similar gallery rows. k is capped at the size of the gallery.

    Arguments as in `info_nce`.
    """
    logits = (queries @ gallery.T).masked_fill(~gallery_valid, -torch.inf)
    nearest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (positives & gallery_valid).gather(1, nearest).any(1)
