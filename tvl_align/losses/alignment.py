"""Alignment: InfoNCE between every pair of modalities, with negatives from all processes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvl_align.contract import Output
from tvl_align.losses.contrastive import constant, cross_entropy, hits_at, indices, join, similarities
from tvl_align.system.console import UserError
from tvl_align.system.distributed import rank, world_size

PIECE = 2**23  # scores computed at once; larger batches compute theirs in chunks of rows
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def pair_name(first: str, second: str) -> str:
    """The name of a pair in metrics: `tactile_vision`, `tactile_text` or `text_vision`, independent of the order."""
    return "_".join(sorted((first, second)))


def active_pairs(
    modalities: Sequence[str], disable_vision_text: bool = False, disable_tactile_text: bool = False
) -> list[tuple[str, str]]:
    """The pairs to align. Raises UserError if none is left."""
    disabled = {
        pair_name("vision", "text"): disable_vision_text,
        pair_name("tactile", "text"): disable_tactile_text,
    }
    pairs = [pair for pair in combinations(modalities, 2) if not disabled.get(pair_name(*pair), False)]
    if not pairs:
        active = ", ".join(modalities)
        raise UserError(f"no pair to align among {active}; name two modalities and leave one pair enabled.")
    return pairs


def chunks(rows: int, scores_per_row: int) -> Iterator[slice]:
    """Slices of local rows, so that each computes at most PIECE scores."""
    size = max(1, PIECE // scores_per_row)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def alignment(
    pooled: Mapping[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]], weights: Sequence[float] = (1.0,)
) -> dict[str, Tensor]:
    """InfoNCE and in-batch accuracy of every pair, with negatives from all processes.

    pooled: {modality: (B, D)}, L2-normalised, or {modality: (B, P, D)} with a vector for each of P prefixes. weights: of the
    prefixes; a loss is the weighted sum over them, an accuracy that of the last one. Returns scalars: `<pair>_loss`,
    `<pair>_acc1` and `<pair>_acc5` (percent, within the batch, for monitoring), and `overlapping_loss`, `average_acc1` and
    `average_acc5`, averaged over the pairs that have rows. Each process uses its own rows as queries; the mean over
    processes is the loss of the joined batch. All pairs, both directions and all prefixes are one batched product; large
    batches are scored in chunks of rows, which are recomputed in the backward pass. Positives are the own row and the rows
    with the same content in a modality of the pair.
    """
    names, wanted = list(pooled), pairs
    pairs = [(first, second) for first, second in pairs if first in pooled and second in pooled]
    if not pairs:
        known = ", ".join(pair_name(*pair) for pair in wanted)
        raise UserError(
            f"the batch has only {', '.join(pooled)}, so none of the pairs to align ({known}); give both of a pair."
        )
    own = torch.stack([x if x.ndim == 3 else x[:, None] for x in pooled.values()]).float().movedim(1, 2)  # (M, P, B, D)
    batch, device, count = own.shape[2], own.device, len(pairs)
    joined = join(own, torch.stack([output.present[m] for m in names]), names, output.caption_keys, output.content_keys)
    of, other = (tuple(names.index(pair[i]) for pair in pairs) for i in (0, 1))
    first, second, there, back = (indices(x, device) for x in (of, other, of + other, other + of))
    valid = joined.flags.index_select(0, first) & joined.flags.index_select(0, second)  # (pairs, G)
    local_valid = valid[:, rank() * batch : (rank() + 1) * batch]
    queries = own.index_select(0, there).unflatten(0, (2, count))  # both directions of every pair
    gallery = joined.vectors.index_select(0, back).unflatten(0, (2, count))
    parts = list(chunks(batch, queries.shape[:3].numel() * valid.shape[1]))
    found = []
    for rows in parts:
        same = joined.same(rows)
        positives = (same.index_select(0, first) | same.index_select(0, second)) & valid[:, None]
        given = queries[..., rows, :], gallery, output.logit_scale, positives, local_valid[:, rows], valid
        found.append(recomputed(_scores, *given) if len(parts) > 1 else _scores(*given))
    losses, hits = (torch.stack(x).sum(0) if len(x) > 1 else x[0] for x in zip(*found, strict=True))
    if len(weights) > 1 or weights[0] != 1:
        losses = losses * constant(tuple(weights), device)
    table = torch.cat([losses.sum((0, 2))[None], 100.0 * hits]) / (valid.sum(1).clamp(min=1) * (2 / world_size()))
    paired = valid.any(1)
    means = table @ (paired / paired.sum().clamp(min=1))
    kinds = ("loss", "acc1", "acc5")
    numbers = {
        f"{pair_name(*pair)}_{kind}": x
        for pair, column in zip(pairs, table.unbind(1), strict=True)
        for kind, x in zip(kinds, column.unbind(0), strict=True)
    }
    return numbers | dict(zip(("overlapping_loss", "average_acc1", "average_acc5"), means.unbind(0), strict=True))


def _scores(
    queries: Tensor, gallery: Tensor, scale: Tensor, positives: Tensor, valid: Tensor, gallery_valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over rows of the losses (2, pairs, P) of both directions, and of the hits at 1 and 5 of the last prefix (2,
    pairs).

    queries (2, pairs, P, b, D), gallery (2, pairs, P, G, D), positives (pairs, b, G), valid (pairs, b), gallery_valid
    (pairs, G).
    """
    logits = similarities(scale * queries, gallery, gallery_valid[:, None])
    losses = cross_entropy(logits, positives[:, None], valid[:, None])
    hits = torch.stack(hits_at(logits[:, :, -1].detach(), positives, (1, 5)))
    return losses, (hits & valid).sum((1, 3), dtype=losses.dtype)


def prefix_alignment(
    prefixes: Mapping[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Alignment of prefixes {modality: (B, n, D)}: sums of the first 1, 2, ... n tokens. Those of weight 0 are skipped."""
    lengths = [k for k, weight in enumerate(weights) if weight or k == len(weights) - 1]
    sums = torch.stack(list(prefixes.values()))  # (M, B, n, D)
    if len(lengths) < len(weights):
        sums = sums.index_select(2, indices(tuple(lengths), sums.device))
    pooled = dict(zip(prefixes, F.normalize(sums, dim=-1).unbind(0), strict=True))
    return alignment(pooled, output, pairs, [weights[k] for k in lengths])
