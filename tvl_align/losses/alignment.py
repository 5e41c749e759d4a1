"""Alignment: InfoNCE between every pair of modalities, over the rows of all processes."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tvl_align.contract import Output
from tvl_align.losses.contrastive import hits_at_k, info_nce, positive_mask
from tvl_align.system.console import UserError
from tvl_align.system.distributed import gather_with_grad, rank, world_size

PIECE = 512  # rows whose scores with all rows are held at a time
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def pair_name(first: str, second: str) -> str:
    """tactile_vision, tactile_text, text_vision: a pair's name in metrics, whatever the order given."""
    return "_".join(sorted((first, second)))


def active_pairs(
    modalities: Sequence[str], disable_vision_text: bool = False, disable_tactile_text: bool = False
) -> list[tuple[str, str]]:
    """The pairs to align. Raises UserError for fewer than two modalities, and where the switches leave none."""
    disabled = {
        pair_name("vision", "text"): disable_vision_text,
        pair_name("tactile", "text"): disable_tactile_text,
    }
    pairs = [pair for pair in combinations(modalities, 2) if not disabled.get(pair_name(*pair), False)]
    if not pairs:
        active = ", ".join(modalities)
        raise UserError(f"no pair to align among {active}; name two modalities and leave one pair enabled.")
    return pairs


def alignment(pooled: dict[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """InfoNCE and in-batch accuracy of every pair, over the rows of all processes.

    pooled: {modality: (B, D)}, normalised. Returns `<pair>_loss`, `<pair>_acc1`, `<pair>_acc5` (percent, inside the
    batch: for watching only), `overlapping_loss`, `average_acc1`, `average_acc5`. A pair without a row is left out of
    the averages. Each process scores its own rows; the mean over processes is the loss of the joined batch. Scores of a
    large batch are held for PIECE rows at a time and computed again for the gradient.
    """
    names, keys = list(pooled), output.caption_keys
    batch, device = len(keys), keys.device
    everyone, present, all_keys = _joined(pooled, output)
    gathered = dict(zip(names, everyone.unbind(1), strict=True))
    there = dict(zip(names, present.unbind(1), strict=True))
    pairs = [(first, second) for first, second in pairs if first in pooled and second in pooled]
    valid = {pair: there[pair[0]] & there[pair[1]] for pair in pairs}
    sums = {pair: [everyone.new_zeros(()) for _ in ("loss", "acc1", "acc5")] for pair in pairs}
    for start in range(0, batch, PIECE):
        piece = slice(start, min(start + PIECE, batch))
        place = torch.arange(piece.start, piece.stop, device=device) + rank() * batch
        own_row = torch.arange(len(everyone), device=device) == place[:, None]
        same_words = own_row | positive_mask(keys[piece], all_keys)
        for (first, second), both in valid.items():
            positives = same_words if "text" in (first, second) else own_row
            so_far = sums[first, second]
            for a, b in ((first, second), (second, first)):
                own, mine = pooled[a][piece], both[place]
                given = own, gathered[b], output.logit_scale, positives, mine, both
                so_far[0] = so_far[0] + (_again(info_nce, *given) if batch > PIECE else info_nce(*given)) / 2
                for i, k in ((1, 1), (2, 5)):
                    hit = hits_at_k(own.detach(), gathered[b].detach(), positives, both, k) & mine
                    so_far[i] = so_far[i] + hit.sum() / 2
    numbers: dict[str, Tensor] = {}
    ran: dict[str, Tensor] = {}
    for pair, (loss, hits1, hits5) in sums.items():
        name, rows = pair_name(*pair), valid[pair].sum().clamp(min=1)
        numbers[f"{name}_loss"] = loss * world_size() / rows
        numbers |= {f"{name}_acc{k}": 100.0 * hits * world_size() / rows for k, hits in ((1, hits1), (5, hits5))}
        ran[name] = valid[pair].any().to(loss.dtype)
    share = torch.stack(list(ran.values()))
    share = share / share.sum().clamp(min=1)
    for total, part in (("overlapping_loss", "loss"), ("average_acc1", "acc1"), ("average_acc5", "acc5")):
        numbers[total] = (torch.stack([numbers[f"{name}_{part}"] for name in ran]) * share).sum()
    return numbers


def _joined(pooled: dict[str, Tensor], output: Output) -> tuple[Tensor, Tensor, Tensor]:
    """Everything that alignment needs of all processes, in one call: pooled (G, M, D), present (G, M), keys (G, K).

    Flags and keys travel as the bits of float32 numbers beside the pooled ones; no gradient reaches them.
    """
    own = torch.stack([x.float() for x in pooled.values()], dim=1)
    present = torch.stack([output.present[m] for m in pooled], dim=1)
    keys = output.caption_keys.contiguous()
    parts = [own.flatten(1), present.float(), keys.view(torch.int32).view(torch.float32)]
    everyone = gather_with_grad(torch.cat(parts, dim=1))
    numbers, flags, bits = everyone.split([part.shape[1] for part in parts], dim=1)
    all_keys = bits.detach().clone(memory_format=torch.contiguous_format).view(torch.int32).view(torch.int64)
    return numbers.unflatten(1, own.shape[1:]), flags.detach() > 0.5, all_keys
