"""The terms of a loss that methods share: aligning pairs over all processes, complementary regularisation, preservation."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from tvl_align.config import RegisterConfig
from tvl_align.console import UserError
from tvl_align.contract import Output
from tvl_align.losses import batch_hits, diversity, info_nce, positive_pairs, reconstruction_error, token_norm
from tvl_align.registers import pooled_overlapping
from tvl_align.runtime import gather_with_grad, rank, world_size


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
    the averages. Each process scores its own rows; the mean over processes is the loss of the joined batch.
    """
    names = list(pooled)
    batch, device = len(output["caption_keys"]), output["caption_keys"].device
    everyone, present, all_keys = _joined(pooled, output)
    gathered = dict(zip(names, everyone.unbind(1), strict=True))
    there = dict(zip(names, present.unbind(1), strict=True))
    mine = slice(rank() * batch, (rank() + 1) * batch)
    own_row = torch.arange(len(everyone), device=device) == torch.arange(mine.start, mine.stop, device=device).unsqueeze(1)
    same_words = own_row | positive_pairs(output["caption_keys"], all_keys)
    numbers: dict[str, Tensor] = {}
    ran: dict[str, Tensor] = {}
    for first, second in pairs:
        if first not in pooled or second not in pooled:
            continue
        name = pair_name(first, second)
        valid = there[first] & there[second]
        positives = same_words if "text" in (first, second) else own_row
        rows = valid.sum().clamp(min=1)
        loss, hits = everyone.new_zeros(()), {1: everyone.new_zeros(()), 5: everyone.new_zeros(())}
        for a, b in ((first, second), (second, first)):
            own = pooled[a]
            loss = loss + info_nce(own, gathered[b], output["logit_scale"], positives, valid[mine], valid) / 2
            for k in hits:
                hit = batch_hits(own.detach(), gathered[b].detach(), positives, valid, k) & valid[mine]
                hits[k] = hits[k] + hit.sum() / 2
        numbers[f"{name}_loss"] = loss * world_size() / rows
        for k, count in hits.items():
            numbers[f"{name}_acc{k}"] = 100.0 * count * world_size() / rows
        ran[name] = valid.any().to(loss.dtype)
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
    present = torch.stack([output["present"][m] for m in pooled], dim=1)
    keys = output["caption_keys"].contiguous()
    parts = [own.flatten(1), present.float(), keys.view(torch.int32).view(torch.float32)]
    everyone = gather_with_grad(torch.cat(parts, dim=1))
    numbers, flags, bits = everyone.split([part.shape[1] for part in parts], dim=1)
    all_keys = bits.detach().clone(memory_format=torch.contiguous_format).view(torch.int32).view(torch.int64)
    return numbers.unflatten(1, own.shape[1:]), flags.detach() > 0.5, all_keys


def complementary_regularisation(output: Output) -> Tensor:
    """L2 norm + diversity of the kept complementary tokens, the mean over the modalities."""
    kept, terms = output.get("nested_dropout_mask"), []
    for name, tokens in output["complementary_tokens"].items():
        there = output["present"][name][:, None].expand(tokens.shape[:2])
        there = there & kept[:, -tokens.shape[1] :] if kept is not None else there
        terms.append(token_norm(tokens, there) + diversity(tokens, there))
    return torch.stack(terms).mean()


def preservation(output: Output) -> Tensor:
    """Error of rebuilding the frozen tokens, the mean over the modalities; zero where nothing is rebuilt."""
    rebuilt = output.get("reconstruction", {}).values()
    if not rebuilt:
        return output["logit_scale"] * 0.0
    return torch.stack([reconstruction_error(r.predicted, r.target, r.mask) for r in rebuilt]).mean()


def total(numbers: dict[str, Tensor], output: Output, reg_weight: float, preservation_weight: float) -> dict[str, Tensor]:
    """Add `complementary_reg`, `preservation` and their weighted sum with `overlapping_loss`, `total_loss`."""
    reg, kept = complementary_regularisation(output), preservation(output)
    weighted = numbers["overlapping_loss"] + reg_weight * reg + preservation_weight * kept
    return numbers | {"complementary_reg": reg, "preservation": kept, "total_loss": weighted}


class RegisterLoss(nn.Module):
    """total = overlapping + complementary_reg_weight * complementary_reg + preservation_weight * preservation.

    overlapping: symmetric InfoNCE between the pooled overlapping tokens of each active pair, averaged over the pairs that
    ran. Called with a model's Output; returns named scalars, `total_loss` among them. It has no parameters.
    Raises UserError for fewer than two modalities, and when both switches together leave no pair.
    """

    def __init__(self, knobs: RegisterConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.pairs = active_pairs(modalities, knobs.disable_vision_text_loss, knobs.disable_tactile_text_loss)
        self.weights = knobs.complementary_reg_weight, knobs.preservation_weight

    def forward(self, output: Output) -> dict[str, Tensor]:
        return total(self.align(output), output, *self.weights)

    def align(self, output: Output) -> dict[str, Tensor]:
        """What a method may do another way: the alignment and its numbers, `overlapping_loss` among them."""
        return alignment(pooled_overlapping(output), output, self.pairs)
