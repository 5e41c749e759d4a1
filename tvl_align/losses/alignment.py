"""Alignment: InfoNCE between every pair of modalities, with negatives from all processes."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvl_align.contract import Output
from tvl_align.losses.contrastive import hits_at_k, info_nce, keys_of, positive_mask
from tvl_align.system.console import UserError
from tvl_align.system.distributed import gather_with_grad, rank, world_size

PIECE = 512  # queries per chunk: larger batches compute their scores chunk by chunk
_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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


def alignment(
    pooled: dict[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]], weights: Sequence[float] = (1.0,)
) -> dict[str, Tensor]:
    """InfoNCE and in-batch accuracy of every pair, with negatives from all processes.

    pooled: {modality: (B, D)}, L2-normalised, or {modality: (B, P, D)} with a vector for each of P prefixes. weights: of the
    prefixes; a loss is the weighted sum over them, an accuracy that of the last one. Returns scalars: `<pair>_loss`,
    `<pair>_acc1` and `<pair>_acc5` (percent, within the batch, for monitoring), and `overlapping_loss`, `average_acc1` and
    `average_acc5`, averaged over the pairs that have rows. Each process uses its own rows as queries; the mean over
    processes is the loss of the joined batch. A batch larger than PIECE is scored in chunks of PIECE rows, which are
    recomputed in the backward pass. Positives are the own row and the rows with the same content in a modality of the pair.
    """
    pooled = {m: x if x.ndim == 3 else x[:, None] for m, x in pooled.items()}
    names, batch, device = list(pooled), len(output.caption_keys), output.caption_keys.device
    all_pooled, all_present, all_captions, all_content = _joined(pooled, output)
    gathered = dict(zip(names, all_pooled.unbind(1), strict=True))
    present = dict(zip(names, all_present.unbind(1), strict=True))
    wanted, pairs = pairs, [(first, second) for first, second in pairs if first in pooled and second in pooled]
    if not pairs:
        known = ", ".join(pair_name(*pair) for pair in wanted)
        raise UserError(
            f"the batch has only {', '.join(pooled)}, so none of the pairs to align ({known}); give both of a pair."
        )
    valid = {pair: present[pair[0]] & present[pair[1]] for pair in pairs}
    keys = {p: (keys_of(p, output.caption_keys, output.content_keys), keys_of(p, all_captions, all_content)) for p in pairs}
    sums = {pair: [all_pooled.new_zeros(()) for _ in ("loss", "acc1", "acc5")] for pair in pairs}
    for start in range(0, batch, PIECE):
        chunk = slice(start, min(start + PIECE, batch))
        index = torch.arange(chunk.start, chunk.stop, device=device) + rank() * batch  # in the joined batch
        same_row = torch.arange(len(all_pooled), device=device) == index[:, None]
        for (first, second), gallery_valid in valid.items():
            (own, others), pair_sums = keys[first, second], sums[first, second]
            positives = same_row if own is None or others is None else same_row | positive_mask(own[chunk], others)
            for a, b in ((first, second), (second, first)):
                queries, queries_valid = pooled[a][chunk], gallery_valid[index]
                for p, share in enumerate(weights):
                    args = queries[:, p], gathered[b][:, p], output.logit_scale, positives, queries_valid, gallery_valid
                    term = _recomputed(info_nce, *args) if batch > PIECE else info_nce(*args)
                    pair_sums[0] = pair_sums[0] + share * term / 2
                for i, k in ((1, 1), (2, 5)):
                    whole, gallery = queries[:, -1].detach(), gathered[b][:, -1].detach()
                    hits = hits_at_k(whole, gallery, positives, gallery_valid, k) & queries_valid
                    pair_sums[i] = pair_sums[i] + hits.sum() / 2
    numbers: dict[str, Tensor] = {}
    has_rows: dict[str, Tensor] = {}
    for pair, (loss, hits1, hits5) in sums.items():
        name, rows = pair_name(*pair), valid[pair].sum().clamp(min=1)
        numbers[f"{name}_loss"] = loss * world_size() / rows
        numbers |= {f"{name}_acc{k}": 100.0 * hits * world_size() / rows for k, hits in ((1, hits1), (5, hits5))}
        has_rows[name] = valid[pair].any().to(loss.dtype)
    weight = torch.stack(list(has_rows.values()))
    weight = weight / weight.sum().clamp(min=1)
    for total, part in (("overlapping_loss", "loss"), ("average_acc1", "acc1"), ("average_acc5", "acc5")):
        numbers[total] = (torch.stack([numbers[f"{name}_{part}"] for name in has_rows]) * weight).sum()
    return numbers


def prefix_alignment(
    tokens: Mapping[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Alignment of the prefixes of tokens {modality: (B, n, D)}, n weights. Prefixes of weight 0 are not computed."""
    lengths = [k for k, weight in enumerate(weights, start=1) if weight or k == len(weights)]
    pooled = {m: torch.stack([F.normalize(z[:, :k].sum(1), dim=-1) for k in lengths], dim=1) for m, z in tokens.items()}
    return alignment(pooled, output, pairs, [weights[k - 1] for k in lengths])


def _joined(pooled: dict[str, Tensor], output: Output) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gather from all processes in one call: pooled (G, M, P, D) float32, present (G, M) bool, caption keys (G, K) int64,
    content keys {modality: (G,) int64}.

    Flags and keys are packed into float32 columns next to the pooled vectors. Only the pooled vectors get gradients.
    """
    own = torch.stack([x.float() for x in pooled.values()], dim=1)
    present = torch.stack([output.present[m] for m in pooled], dim=1)
    keys = torch.cat([output.caption_keys, *(column[:, None] for column in output.content_keys.values())], dim=1)
    parts = [own.flatten(1), present.float(), keys.view(torch.int32).view(torch.float32)]
    gathered = gather_with_grad(torch.cat(parts, dim=1))
    vectors, flags, bits = gathered.split([part.shape[1] for part in parts], dim=1)
    all_keys = bits.detach().clone(memory_format=torch.contiguous_format).view(torch.int32).view(torch.int64)
    captions = output.caption_keys.shape[1]
    content = dict(zip(output.content_keys, all_keys[:, captions:].unbind(1), strict=True))
    return vectors.unflatten(1, own.shape[1:]), flags.detach() > 0.5, all_keys[:, :captions], content
