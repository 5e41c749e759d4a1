"""cursor_flux_talk_register_tokens v1. RegisterTokenLoss: contrastive + 0.01 x (L2 norm + diversity), nothing else."""

from collections.abc import Sequence

from torch import Tensor, nn

from experiments.stage2.cursor.register_tokens import CursorConfig
from tvl_align.alignment import active_pairs, alignment, total
from tvl_align.contract import MODALITIES, Output
from tvl_align.registers import pooled_overlapping


class RegisterTokenLoss(nn.Module):
    """total = overlapping + complementary_reg_weight * complementary_reg; called with a model's Output."""

    def __init__(self, knobs: CursorConfig, active_modalities: Sequence[str] = MODALITIES) -> None:
        super().__init__()
        self.pairs = active_pairs(active_modalities, knobs.disable_vision_text_loss, knobs.disable_tactile_text_loss)
        self.reg_weight = knobs.complementary_reg_weight

    def forward(self, output: Output) -> dict[str, Tensor]:
        numbers = alignment(pooled_overlapping(output), output, self.pairs)
        return total(numbers, output, self.reg_weight, preservation_weight=0.0)
