"""Stage2Loss: align what modalities share, keep what they do not.

    total = overlapping + complementary_reg_weight * complementary_reg + preservation_weight * preservation

overlapping: symmetric InfoNCE between the pooled overlapping tokens of each active pair, averaged over the pairs that
ran. complementary_reg: L2 norm + diversity of the complementary tokens. preservation: error of rebuilding the frozen
tokens from (stop-gradient overlapping + complementary) tokens; with weight 0 this is the documented formula exactly.

Negatives come from all processes, with the gradients of one process on the joined batch. Experiment ID stage2_base,
version 1.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from tvl_align.console import UserError
from tvl_align.contract import MODALITIES, Output
from tvl_align.losses import batch_hits, diversity, info_nce, positive_pairs, reconstruction_error, token_norm
from tvl_align.registers import pooled_overlapping
from tvl_align.runtime import gather, gather_with_grad, rank, world_size


def pair_name(first: str, second: str) -> str:
    """tactile_vision, tactile_text, text_vision: a pair's name in metrics, whatever the order given."""
    return "_".join(sorted((first, second)))


class Stage2Loss(nn.Module):
    """Called with a model's Output; returns named scalars, `total_loss` among them. It has no parameters.

    Raises UserError for fewer than two modalities, and when both switches together leave no pair.
    """

    def __init__(
        self,
        active_modalities: Sequence[str] = MODALITIES,
        num_overlapping_tokens: int = 3,
        complementary_reg_weight: float = 0.01,
        preservation_weight: float = 0.0,
        disable_vision_text_loss: bool = False,
        disable_tactile_text_loss: bool = False,
    ) -> None:
        super().__init__()
        disabled = {
            pair_name("vision", "text"): disable_vision_text_loss,
            pair_name("tactile", "text"): disable_tactile_text_loss,
        }
        pairs = list(combinations(active_modalities, 2))
        self.pairs = [pair for pair in pairs if not disabled.get(pair_name(*pair), False)]
        if not self.pairs:
            active = ", ".join(active_modalities)
            raise UserError(f"no pair to align among {active}; name two modalities and leave one pair enabled.")
        self.num_overlapping = num_overlapping_tokens
        self.reg_weight, self.preservation_weight = complementary_reg_weight, preservation_weight

    def forward(self, output: Output) -> dict[str, Tensor]:
        numbers = alignment(pooled_overlapping(output), output, self.pairs)
        numbers["complementary_reg"] = self._complementary_reg(output)
        numbers["preservation"] = self._preservation(output)
        numbers["total_loss"] = (
            numbers["overlapping_loss"]
            + self.reg_weight * numbers["complementary_reg"]
            + self.preservation_weight * numbers["preservation"]
        )
        return numbers

    def _complementary_reg(self, output: Output) -> Tensor:
        kept, terms = output.get("nested_dropout_mask"), []
        for name, tokens in output["complementary_tokens"].items():
            there = output["present"][name][:, None].expand(tokens.shape[:2])
            there = there & kept[:, self.num_overlapping :] if kept is not None else there
            terms.append(token_norm(tokens, there) + diversity(tokens, there))
        return torch.stack(terms).mean()

    def _preservation(self, output: Output) -> Tensor:
        rebuilt = output.get("reconstruction", {}).values()
        if not rebuilt:
            return output["logit_scale"] * 0.0
        return torch.stack([reconstruction_error(r.predicted, r.target, r.mask) for r in rebuilt]).mean()


def alignment(pooled: dict[str, Tensor], output: Output, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """InfoNCE and in-batch accuracy of every pair, over the rows of all processes.

    pooled: {modality: (B, D)}, normalised. Returns `<pair>_loss`, `<pair>_acc1`, `<pair>_acc5` (percent, inside the
    batch: for watching only), `overlapping_loss`, `average_acc1`, `average_acc5`. A pair without a row is left out of
    the averages. Each process scores its own rows; the mean over processes is the loss of the joined batch.
    """
    names = list(pooled)
    batch = len(output["caption_keys"])
    everyone = gather_with_grad(torch.stack([pooled[m] for m in names], dim=1))
    gathered = dict(zip(names, everyone.unbind(1), strict=True))
    present = gather(torch.stack([output["present"][m] for m in names], dim=1))
    there = dict(zip(names, present.unbind(1), strict=True))
    all_keys = gather(output["caption_keys"])
    mine = slice(rank() * batch, (rank() + 1) * batch)
    own_row = torch.arange(len(everyone), device=everyone.device) == torch.arange(
        mine.start, mine.stop, device=everyone.device
    ).unsqueeze(1)
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
