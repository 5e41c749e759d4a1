"""stage2_base v2.1. Stage2Loss: align what modalities share, keep what they do not.

    total = overlapping + complementary_reg_weight * complementary_reg + preservation_weight * preservation

overlapping: symmetric InfoNCE between the pooled overlapping tokens of each active pair, averaged over the pairs that
ran. complementary_reg: L2 norm + diversity of the complementary tokens. preservation: error of rebuilding the frozen
tokens from (stop-gradient overlapping + complementary) tokens; with weight 0 this is the documented formula exactly.

Negatives come from all processes, with the gradients of one process on the joined batch.
"""

from collections.abc import Sequence

from tvl_align.alignment import RegisterLoss
from tvl_align.config import RegisterConfig
from tvl_align.contract import MODALITIES


class Stage2Loss(RegisterLoss):
    """Called with a model's Output; returns named scalars, `total_loss` among them. It has no parameters.

    `num_overlapping_tokens` is part of the documented signature; the output itself says how many there are.
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
        knobs = RegisterConfig(
            num_overlapping_tokens=num_overlapping_tokens,
            complementary_reg_weight=complementary_reg_weight,
            preservation_weight=preservation_weight,
            disable_vision_text_loss=disable_vision_text_loss,
            disable_tactile_text_loss=disable_tactile_text_loss,
        )
        super().__init__(knobs, active_modalities)
