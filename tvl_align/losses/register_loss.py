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
    """Mean L2 norm + diversity of the kept complementary tokens, averaged over the modalities -> ()."""
    kept, terms = output.nested_dropout_mask, []
    for name, tokens in output.complementary_tokens.items():
        mask = output.present[name][:, None].expand(tokens.shape[:2])
        mask = mask & kept[:, -tokens.shape[1] :] if kept is not None else mask
        terms.append(token_norm(tokens, mask) + diversity(tokens, mask))
    return torch.stack(terms).mean()


def preservation(output: Output) -> Tensor:
    """Mean squared error of reconstructing the frozen tokens, averaged over the modalities -> ().

    The tokens have unit variance, so predicting their mean gives 1. A method without a decoder gives 0.
    """
    reconstructions = output.reconstruction.values()
    if not reconstructions:
        return output.logit_scale * 0.0
    return torch.stack([masked_mean(r.error, r.mask) for r in reconstructions]).mean()


def total(numbers: dict[str, Tensor], output: Output, reg_weight: float, preservation_weight: float) -> dict[str, Tensor]:
    """Return `numbers` with `complementary_reg`, `preservation` and `total_loss`, their weighted sum with
    `overlapping_loss`, added."""
    reg, preserved = complementary_regularisation(output), preservation(output)
    weighted = numbers["overlapping_loss"] + reg_weight * reg + preservation_weight * preserved
    return numbers | {"complementary_reg": reg, "preservation": preserved, "total_loss": weighted}


class RegisterLoss(nn.Module):
    """total = overlapping + complementary_reg_weight * complementary_reg + preservation_weight * preservation.

    overlapping: symmetric InfoNCE between the pooled overlapping tokens of each active pair, averaged over the pairs with
    rows in the batch. `forward` takes a model's Output and returns named scalars, among them `total_loss`. The loss has no
    parameters. Raises UserError if no pair of modalities is left to align.
    """

    def __init__(self, knobs: RegisterConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.pairs = active_pairs(modalities, knobs.disable_vision_text_loss, knobs.disable_tactile_text_loss)
        self.weights = knobs.complementary_reg_weight, knobs.preservation_weight

    def forward(self, output: Output) -> dict[str, Tensor]:
        return total(self.align(output), output, *self.weights)

    def align(self, output: Output) -> dict[str, Tensor]:
        """Compute the alignment loss and its metrics, among them `overlapping_loss`. Methods may override this."""
        return alignment(pooled_overlapping(output), output, self.pairs)
