"""cursor_flux_talk_register_tokens v1. RegisterTokenLoss: contrastive + 0.01 x (L2 norm + diversity), nothing else."""

from collections.abc import Sequence
from dataclasses import replace

from experiments.stage2.cursor.register_tokens import CursorConfig
from tvl_align.alignment import RegisterLoss
from tvl_align.contract import MODALITIES


class RegisterTokenLoss(RegisterLoss):
    """total = overlapping + complementary_reg_weight * complementary_reg; called with a model's Output."""

    def __init__(self, knobs: CursorConfig, active_modalities: Sequence[str] = MODALITIES) -> None:
        super().__init__(replace(knobs, preservation_weight=0.0), active_modalities)
