"""Contrastive losses as pure functions of tensors. Slow reference implementations are in tests/reference.py.

Shapes: B local rows, G rows of all processes, D width, M modalities. Leading dimensions (...) are problems of their own that
are solved at once, as batched products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tvl_align.system.distributed import gather_with_grad, rank, world_size


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


NEVER = -1e9  # logit of a row that is not in the gallery; its probability is exactly zero


def similarities(queries: Tensor, gallery: Tensor, gallery_valid: Tensor) -> Tensor:
    """Products (..., B, G) of queries (..., B, D) and gallery (..., G, D); NEVER where gallery_valid (..., G) is False."""
    return (queries @ gallery.mT).masked_fill(~gallery_valid[..., None, :], NEVER)


def cross_entropy(logits: Tensor, positives: Tensor, valid: Tensor) -> Tensor:
    """Logits (..., B, G), positives (..., B, G) bool in the valid gallery, valid queries (..., B) -> sum over rows (...)."""
    per_row = (logits.log_softmax(-1) * positives).sum(-1) / -positives.sum(-1).clamp(min=1)
    return (per_row * valid).sum(-1)


def info_nce(
    queries: Tensor, gallery: Tensor, scale: Tensor | float, positives: Tensor, valid: Tensor, gallery_valid: Tensor
) -> Tensor:
    """InfoNCE loss with one or more positives per query, summed over the valid queries -> (...).

    queries (..., B, D) and gallery (..., G, D), L2-normalised; scale (): inverse temperature; positives (..., B, G) bool;
    valid (..., B) and gallery_valid (..., G) bool: rows that have both modalities of the pair. With one positive this is the
    cross-entropy of CLIP. With several it averages their log-probabilities (Khosla et al. 2020, arXiv:2004.11362, eq. 2).
    """
    logits = similarities(scale * queries, gallery, gallery_valid)
    return cross_entropy(logits, positives & gallery_valid[..., None, :], valid)


def hits_at(logits: Tensor, positives: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """For each k, (..., B) bool: True if a positive is among the k largest logits (..., B, G) of a row.

    positives as in `cross_entropy`. k is capped at the size of the gallery.
    """
    nearest = logits.topk(min(max(ks), logits.shape[-1]), dim=-1).indices
    found = positives.expand(logits.shape).gather(-1, nearest)
    return [found[..., :k].any(-1) for k in ks]


@dataclass(frozen=True)
class Joined:
    """The batches of all processes, for M modalities.

    vectors (M, ..., G, D): the same in all rows of a modality. flags (F, G) bool. keys (B, C) and all_keys (G, C) int64:
    captions, then contents. columns: for each modality the columns of its keys; none: all rows differ.
    """

    vectors: Tensor
    flags: Tensor
    keys: Tensor
    all_keys: Tensor
    columns: tuple[tuple[int, ...], ...]

    def same(self, rows: slice) -> Tensor:
        """(M, b, G) bool for b local rows: the row itself, and rows with the same content in the modality."""
        everyone = torch.arange(len(self.all_keys), device=self.keys.device)
        own = everyone == everyone[rows.start + rank() * len(self.keys) :][: rows.stop - rows.start, None]
        masks = [own] * len(self.columns)
        for m, columns in enumerate(self.columns):
            for c in columns:
                masks[m] = masks[m] | (self.keys[rows, c, None] == self.all_keys[:, c])
        return torch.stack(masks)


def join(
    vectors: Tensor, flags: Tensor, names: Sequence[str], caption_keys: Tensor, content_keys: Mapping[str, Tensor]
) -> Joined:
    """Gather vectors (M, ..., B, D) float32 of the named modalities, flags (F, B) bool and keys from all processes.

    It is one call: flags and keys are packed into float32 columns next to the vectors. Only the vectors get gradients.
    """
    captions = caption_keys.shape[1]
    keys = torch.cat([caption_keys, *(column[:, None] for column in content_keys.values())], dim=1)
    place = {m: (captions + i,) for i, m in enumerate(content_keys)}
    columns = tuple((*(range(captions) if m == "text" else ()), *place.get(m, ())) for m in names)
    if world_size() == 1:
        return Joined(vectors, flags, keys, keys, columns)
    own = vectors.movedim(-2, 0)
    parts = [own.flatten(1), flags.T.float(), keys.view(torch.int32).view(torch.float32)]
    gathered = gather_with_grad(torch.cat(parts, dim=1))
    found, on, bits = gathered.split([part.shape[1] for part in parts], dim=1)
    all_keys = bits.detach().clone(memory_format=torch.contiguous_format).view(torch.int32).view(torch.int64)
    return Joined(found.unflatten(1, own.shape[1:]).movedim(0, -2), on.detach().T > 0.5, keys, all_keys, columns)


@cache
def indices(values: tuple[int, ...], device: torch.device) -> Tensor:
    """A constant index (n,) int64 on a device, made once."""
    return torch.tensor(values, device=device)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constant numbers (n,) float32 on a device, made once."""
    return torch.tensor(values, dtype=torch.float32, device=device)
