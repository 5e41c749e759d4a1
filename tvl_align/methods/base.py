"""stage2_base v2.1. TVLStage2, the base model: register tokens that separate shared from unique information.

The same learnable registers attend to the frozen tokens of each modality separately. Every modality has its own key
projection and, unless `share_weights` is set, its own blocks. The loss aligns the first `num_overlapping_tokens` registers
across modalities; the rest are complementary. tvl_align.methods.separated describes how the two groups are separated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature

from tvl_align.contract import MODALITIES, FeatureSpec, Implementation, Method
from tvl_align.encoders.tvl import Stage1
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.methods.separated import SeparatedConfig, SeparatedModel
from tvl_align.registers.model import RegisterConfig
from tvl_align.registers.nested import NestedMode


@dataclass(frozen=True)
class Stage2Config(SeparatedConfig):
    """The registers and their loss."""

    share_weights: bool = False
    """Use the same blocks for every modality."""


class TVLStage2(SeparatedModel):
    """Registers over frozen features. `forward` takes raw inputs or stored features (see RegisterModel).

    Args:
        stage1_model: the frozen encoders, or the shapes of their features if the model is used on stored features only.
        num_register_tokens: N.
        num_overlapping_tokens: No < N; the other registers are complementary.
        register_token_dim: D, divisible by num_heads.
        nested_dropout_rate: drop probability of the last register (see tvl_align.registers.nested).
        preservation: build the decoders that the preservation term of the loss needs.
        share_weights: use the same blocks for every modality.
        bottleneck, noise, canonical: see tvl_align.methods.separated.SeparatedConfig.
    Raises:
        UserError: N <= No, or D not divisible by the number of heads.
    """

    def __init__(
        self,
        stage1_model: Stage1 | Mapping[str, FeatureSpec],
        num_register_tokens: int = 4,
        num_overlapping_tokens: int = 3,
        register_token_dim: int = 768,
        num_cross_attn_layers: int = 2,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        nested_dropout_rate: float = 0.5,
        nested_dropout_mode: NestedMode = "nested",
        preservation: bool = True,
        share_weights: bool = False,
        bottleneck: int = 24,
        noise: float = 0.6,
        canonical: int = 60,
    ) -> None:
        knobs = SeparatedConfig(
            num_register_tokens=num_register_tokens,
            num_overlapping_tokens=num_overlapping_tokens,
            register_token_dim=register_token_dim,
            num_cross_attn_layers=num_cross_attn_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            nested_dropout_rate=nested_dropout_rate,
            nested_dropout_mode=nested_dropout_mode,
            preservation_weight=float(preservation),
            bottleneck=bottleneck,
            noise=noise,
            canonical=canonical,
        )
        super().__init__(stage1_model, knobs, share_weights=share_weights)

    @classmethod
    def of(cls, knobs: Stage2Config, specs: Mapping[str, FeatureSpec]) -> "TVLStage2":
        """Build the model from the options of a run, with decoders if `preservation_weight` > 0."""
        shape = {name: value for name, value in vars(knobs).items() if name in signature(cls).parameters}
        return cls(specs, preservation=knobs.preservation_weight > 0, **shape)


class Stage2Loss(RegisterLoss):
    """The loss of the base: takes a model's Output and returns named scalars, among them `total_loss`. It has no parameters.

    `num_overlapping_tokens` is part of the documented signature and has no effect, because the Output holds its own number.
    Raises UserError if no pair of modalities is left to align.
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


BASE = Method(Implementation("stage2_base", "2.1", "STAGE2"), Stage2Config, TVLStage2.of, RegisterLoss)
