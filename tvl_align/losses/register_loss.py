"""RegisterLoss: the weighted sum of alignment, complementary regularisation and preservation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tvl_align.contract import Output
from tvl_align.losses.alignment import active_pairs, alignment
from tvl_align.losses.complementary import diversity, masked_mean, token_norm
from tvl_align.registers.model import RegisterConfig
from tvl_align.registers.pooling import pooled_overlapping


def complementary_regularisation(output: Output) -> Tensor:
    """L2 norm + diversity of the kept complementary tokens, the mean over the modalities."""
    kept, terms = output.nested_dropout_mask, []
    for name, tokens in output.complementary_tokens.items():
        there = output.present[name][:, None].expand(tokens.shape[:2])
        there = there & kept[:, -tokens.shape[1] :] if kept is not None else there
        terms.append(token_norm(tokens, there) + diversity(tokens, there))
    return torch.stack(terms).mean()


def preservation(output: Output) -> Tensor:
    """Error of rebuilding the real frozen tokens, the mean over the modalities: 1 where nothing was kept; zero where nothing
    is rebuilt."""
    rebuilt = output.reconstruction.values()
    if not rebuilt:
        return output.logit_scale * 0.0
    return torch.stack([masked_mean(r.error, r.mask) for r in rebuilt]).mean()


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
