"""Where registers look: how much each frozen token moves each register. It is defined for every method, also for those that
read tokens through principal components instead of attending to them.

Shapes: B rows, N registers of width D, T tokens of a modality.
"""

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
        output = model(Features(tokens, features.caption_keys, features.rows), kept=kept, joint=False)
        maps: dict[str, list[Tensor]] = {m: [] for m in leaves}
        for m, leaf in leaves.items():
            registers = torch.cat([output.overlapping_tokens[m], output.complementary_tokens[m]], dim=1)
            for n in range(registers.shape[1]):
                energy = registers[:, n].float().square().sum() / 2
                (slope,) = torch.autograd.grad(energy, leaf, retain_graph=True, allow_unused=True)
                maps[m].append(torch.zeros_like(leaf).norm(dim=-1) if slope is None else slope.norm(dim=-1))
    stacked = {m: torch.stack(x, dim=1) * tokens[m].mask[:, None] for m, x in maps.items()}
    return {m: x / x.sum(-1, keepdim=True).clamp(min=1e-12) for m, x in stacked.items()}
