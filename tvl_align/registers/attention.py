"""Where registers look: how much each frozen token moves each register. It is defined for every method, also for those that
read tokens through principal components instead of attending to them.

Shapes: B rows, N registers of width D, T tokens of a modality.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tvl_align.contract import Features, Tokens


def attention_maps(model: nn.Module, features: Features, kept: Tensor | None = None) -> dict[str, Tensor]:
    """{modality: (B, N, T)} float32, of sum 1 over T: the norm of the gradient, at each frozen token, of half the squared
    norm of a register.

    model: in evaluation mode. kept: (B, N) bool, the registers that are kept; default: all. A register that reads nothing,
    such as a dropped one, has zeros.
    """
    with torch.enable_grad():
        leaves = {m: t.tokens.float().detach().requires_grad_() for m, t in features.modalities.items()}
        tokens = {m: Tokens(leaves[m], t.mask, t.pooled.float(), t.present) for m, t in features.modalities.items()}
        output = model(replace(features, modalities=tokens), kept=kept, joint=False)
        both = (output.overlapping_tokens, output.complementary_tokens)
        registers = torch.stack([torch.cat([of[m] for of in both], dim=1) for m in leaves]).float()  # (M, B, N, D)
        slopes = []
        for n in range(registers.shape[2]):
            energy = registers[:, :, n].square().sum() / 2  # of all modalities at once: each reads its own tokens only
            found = torch.autograd.grad(energy, list(leaves.values()), retain_graph=True, allow_unused=True)
            slopes.append(found)
    stacked: dict[str, Tensor] = {}
    for (m, leaf), of_leaf in zip(leaves.items(), zip(*slopes, strict=True), strict=True):
        norms = [torch.zeros_like(leaf[..., 0]) if slope is None else slope.norm(dim=-1) for slope in of_leaf]
        stacked[m] = torch.stack(norms, dim=1) * tokens[m].mask[:, None]
    return {m: x / x.sum(-1, keepdim=True).clamp(min=1e-12) for m, x in stacked.items()}
