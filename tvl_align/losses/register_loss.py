"""RegisterLoss: the weighted sum of alignment, complementary regularisation and preservation."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tvl_align.contract import Output
from tvl_align.losses.alignment import active_pairs, alignment
from tvl_align.losses.complementary import diversity, masked_mean, token_norm
from tvl_align.registers.model import RegisterConfig
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.system.distributed import rank


def complete_output(output: Output | Mapping[str, Any]) -> Output:
    """An Output, or a mapping with its entries -> an Output in float32 with every entry that a loss needs.

    Needed are overlapping_tokens and complementary_tokens; see Output for the defaults of the others. Entries of a mapping
    that Output does not know become extras. Raises UserError for any other value.
    """
    if not isinstance(output, Output):
        if not isinstance(output, Mapping):
            raise UserError(f"the loss was given a {type(output).__name__}; give it a model's Output, or a dict like it.")
        given = {name: value for name, value in output.items() if value is not None}
        missing = [name for name in ("overlapping_tokens", "complementary_tokens") if name not in given]
        if missing:
            raise UserError(
                f"the output has no {' and no '.join(missing)}, only {', '.join(given)}; give it to the loss too."
            )
        known = {f.name: given.pop(f.name) for f in fields(Output) if f.name in given}
        extras = known.pop("extras", {}) | given
        output = Output(**{"stage1_features": {}} | known, extras=extras)
    tokens = output.overlapping_tokens
    if not tokens:
        raise UserError("the output has overlapping tokens of no modality; give at least two.")
    first = next(iter(tokens.values()))
    absent = {m: z for m, z in tokens.items() if m not in output.present}
    present = {m: torch.ones(len(z), dtype=torch.bool, device=z.device) for m, z in absent.items()} | output.present
    keys = output.caption_keys
    if not len(keys):
        keys = torch.arange(len(first), device=first.device)[:, None] + (rank() << 32)  # different on all processes
    scale = torch.as_tensor(output.logit_scale, device=first.device)
    return replace(output, present=present, caption_keys=keys, logit_scale=scale).float()


def complementary_regularisation(output: Output) -> Tensor:
    """Mean L2 norm + diversity of the kept complementary tokens, averaged over the modalities -> ()."""
    tokens = torch.stack(list(output.complementary_tokens.values()))  # (M, B, Nc, D)
    mask = torch.stack([output.present[m] for m in output.complementary_tokens])[..., None].expand(tokens.shape[:3])
    if output.nested_dropout_mask is not None:
        mask = mask & output.nested_dropout_mask[:, -tokens.shape[2] :]
    penalties = token_norm(tokens, mask)
    return (penalties + diversity(tokens, mask) if tokens.shape[2] > 1 else penalties).mean()


def rebuilding_errors(output: Output) -> Tensor:
    """Mean squared error of rebuilding the frozen tokens of each modality, (M,); (1,) of 0 for a method without a decoder.

    The tokens have unit variance, so predicting their mean gives 1. Augmented pictures do not count.
    """
    found = list(output.reconstruction.values())
    if not found:
        return output.logit_scale[None] * 0.0
    masks = [plain(r.mask, output, m) for m, r in output.reconstruction.items()]
    if len({r.error.shape for r in found}) == 1:
        return masked_mean(torch.stack([r.error for r in found]), torch.stack(masks))
    return torch.stack([masked_mean(r.error, mask) for r, mask in zip(found, masks, strict=True)])


def plain(mask: Tensor, output: Output, modality: str) -> Tensor:
    """A mask (B, ...) bool of a modality without the rows whose picture is augmented.

    These rows teach what modalities share. What only their picture shows may be its augmentation, drawn for it alone.
    """
    if modality not in output.augmented:
        return mask
    return mask & ~output.augmented[modality].view(-1, *[1] * (mask.ndim - 1))


class RegisterLoss(nn.Module):
    """total = overlapping + complementary_reg_weight * complementary_reg + preservation_weight * preservation.

    overlapping: symmetric InfoNCE between the pooled overlapping tokens of each active pair, averaged over the pairs with
    rows in the batch. preservation: the error of rebuilding the frozen tokens, averaged over the modalities. `forward` takes
    a model's Output, or a mapping with its entries, and returns named scalars, among them `total_loss`. It computes in
    float32, also under autocast. The loss has no parameters. Raises UserError if no pair of modalities is left to align.
    """

    def __init__(self, knobs: RegisterConfig, modalities: Sequence[str]) -> None:
        super().__init__()
        self.pairs = active_pairs(modalities, knobs.disable_vision_text_loss, knobs.disable_tactile_text_loss)
        self.weights = knobs.complementary_reg_weight, knobs.preservation_weight

    def forward(self, output: Output | Mapping[str, Any]) -> dict[str, Tensor]:
        output = complete_output(output)
        with torch.autocast(output.logit_scale.device.type, enabled=False):
            return self.terms(output)

    def terms(self, output: Output) -> dict[str, Tensor]:
        """The named scalars of a complete Output in float32. Methods may add to them."""
        numbers, (reg_weight, preservation_weight) = self.align(output), self.weights
        reg, preserved = complementary_regularisation(output), self.preserve(rebuilding_errors(output))
        weighted = numbers["overlapping_loss"].add(reg, alpha=reg_weight).add(preserved, alpha=preservation_weight)
        return numbers | {"complementary_reg": reg, "preservation": preserved, "total_loss": weighted}

    def align(self, output: Output) -> dict[str, Tensor]:
        """Compute the alignment loss and its metrics, among them `overlapping_loss`. Methods may override this."""
        return alignment(pooled_overlapping(output), output, self.pairs)

    def preserve(self, errors: Tensor) -> Tensor:
        """The preservation term, of the errors of the modalities (M,) -> (). Methods may override this."""
        return errors.mean()
