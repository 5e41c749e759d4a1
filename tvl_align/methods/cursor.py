"""cursor_flux_talk_register_tokens v1. RegisterTokenModule: one pooled key per modality, weights shared by all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from tvl_align.config import Ignored
from tvl_align.contract import MODALITIES, FeatureSpec, Implementation, Method
from tvl_align.encoders.tvl import Stage1
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.registers.model import RegisterConfig, RegisterModel
from tvl_align.registers.nested import NestedMode


@dataclass(frozen=True)
class CursorConfig(RegisterConfig):
    """The registers and their loss, as documented."""

    nested_dropout_mode: NestedMode = "independent"
    """independent: each register is dropped independently, as documented; nested: the kept registers are always a prefix."""
    preservation_weight: tyro.conf.Suppress[Annotated[float, Ignored("the design has no preservation term")]] = 0.0
    share_weights: tyro.conf.Suppress[Annotated[bool, Ignored("all modalities share their blocks")]] = True


class RegisterTokenModule(RegisterModel):
    """Registers that attend to the pooled feature of each modality.

    The softmax over a single key is 1, so the attention cannot select anything and the query weights get no gradient. This
    is the documented design, kept as the baseline.
    """

    def __init__(self, stage1_model: Stage1 | Mapping[str, FeatureSpec], knobs: CursorConfig) -> None:
        super().__init__(stage1_model, knobs, keys="pooled", share_weights=True)


class RegisterTokenLoss(RegisterLoss):
    """total = overlapping + complementary_reg_weight * complementary_reg, computed from a model's Output."""

    def __init__(self, knobs: CursorConfig, active_modalities: Sequence[str] = MODALITIES) -> None:
        super().__init__(replace(knobs, preservation_weight=0.0), active_modalities)


CURSOR = Method(
    Implementation("cursor_flux_talk_register_tokens", "1", "CURSOR"),
    CursorConfig,
    lambda knobs, specs: RegisterTokenModule(specs, knobs),
    RegisterTokenLoss,
    recordable=True,
)
