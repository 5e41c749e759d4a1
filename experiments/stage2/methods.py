"""METHODS: every approach to Stage 2, the only list. Its keys are what `--method` and the tables call them."""

from collections.abc import Mapping, Sequence

from torch import nn

from experiments.stage2.cursor import RegisterTokenLoss, RegisterTokenModule
from experiments.stage2.cursor.register_tokens import CursorConfig
from experiments.stage2.loss_stage2 import Stage2Loss
from experiments.stage2.tvl_stage2 import Stage2Config, TVLStage2
from experiments.stage2.variants.disentangled import Disentangled, DisentangledConfig, DisentangledLoss
from experiments.stage2.variants.flextok import FlexTok, FlexTokConfig, FlexTokLoss
from experiments.stage2.variants.matryoshka import Matryoshka, MatryoshkaConfig, MatryoshkaLoss
from tvl_align.contract import FeatureSpec, Implementation, Method


def _base_model(knobs: Stage2Config, specs: Mapping[str, FeatureSpec]) -> nn.Module:
    return TVLStage2(
        specs,
        num_register_tokens=knobs.num_register_tokens,
        num_overlapping_tokens=knobs.num_overlapping_tokens,
        register_token_dim=knobs.register_token_dim,
        num_cross_attn_layers=knobs.num_cross_attn_layers,
        num_heads=knobs.num_heads,
        mlp_ratio=knobs.mlp_ratio,
        drop_rate=knobs.drop_rate,
        attn_drop_rate=knobs.attn_drop_rate,
        drop_path_rate=knobs.drop_path_rate,
        nested_dropout_rate=knobs.nested_dropout_rate,
        nested_dropout_mode=knobs.nested_dropout_mode,
        preservation=knobs.preservation_weight > 0,
        share_weights=knobs.share_weights,
    )


def _base_loss(knobs: Stage2Config, modalities: Sequence[str]) -> nn.Module:
    return Stage2Loss(
        modalities,
        num_overlapping_tokens=knobs.num_overlapping_tokens,
        complementary_reg_weight=knobs.complementary_reg_weight,
        preservation_weight=knobs.preservation_weight,
        disable_vision_text_loss=knobs.disable_vision_text_loss,
        disable_tactile_text_loss=knobs.disable_tactile_text_loss,
    )


METHODS: dict[str, Method] = {
    "base": Method(Implementation("stage2_base", "1", "STAGE2"), Stage2Config, _base_model, _base_loss),
    "cursor": Method(
        Implementation("cursor_flux_talk_register_tokens", "1", "CURSOR"),
        CursorConfig,
        lambda knobs, specs: RegisterTokenModule(specs, knobs),
        RegisterTokenLoss,
    ),
    "flextok": Method(
        Implementation("stage2_flextok", "1", "FLEXTOK"),
        FlexTokConfig,
        lambda knobs, specs: FlexTok(specs, knobs),
        FlexTokLoss,
    ),
    "matryoshka": Method(
        Implementation("stage2_matryoshka", "1", "MATRYOSHKA"),
        MatryoshkaConfig,
        lambda knobs, specs: Matryoshka(specs, knobs),
        MatryoshkaLoss,
    ),
    "disentangled": Method(
        Implementation("stage2_disentangled", "1", "DISENTANGLED"),
        DisentangledConfig,
        lambda knobs, specs: Disentangled(specs, knobs),
        DisentangledLoss,
    ),
}
