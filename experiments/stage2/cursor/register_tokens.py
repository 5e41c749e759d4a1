"""cursor_flux_talk_register_tokens v1. RegisterTokenModule: one pooled key per modality, weights shared by all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from tvl_align.config import RegisterConfig
from tvl_align.contract import FeatureSpec
from tvl_align.encoders.tvl import Stage1
from tvl_align.nested import NestedMode
from tvl_align.register_model import RegisterModel


@dataclass(frozen=True)
class CursorConfig(RegisterConfig):
    """The registers and their loss, as documented."""

    nested_dropout_mode: NestedMode = "independent"
    """independent: every register is drawn alone, as documented; nested: what is kept is always a prefix."""
    preservation_weight: float = 0.0
    """Accepted; the documented design has no preservation term."""
    share_weights: bool = True
    """Accepted; the documented design uses one set of blocks for every modality."""


class RegisterTokenModule(RegisterModel):
    """Registers that attend to the pooled feature of each modality.

    The softmax over one key is 1: the registers cannot choose what to read, and the query weights get no gradient. This is
    the design as it was documented, kept as the yardstick.
    """

    def __init__(self, stage1_model: Stage1 | Mapping[str, FeatureSpec], knobs: CursorConfig) -> None:
        super().__init__(stage1_model, knobs, keys="pooled", share_weights=True)
