"""METHODS: every approach to Stage 2, the only list. Its keys are what `--method` and the tables call them."""

from experiments.stage2.cursor import RegisterTokenLoss, RegisterTokenModule
from experiments.stage2.cursor.register_tokens import CursorConfig
from experiments.stage2.tvl_stage2 import Stage2Config, TVLStage2
from experiments.stage2.variants.disentangled import Disentangled, DisentangledConfig
from experiments.stage2.variants.flextok import FlexTok, FlexTokConfig
from experiments.stage2.variants.matryoshka import Matryoshka, MatryoshkaConfig, MatryoshkaLoss
from tvl_align.alignment import RegisterLoss
from tvl_align.contract import Implementation, Method

METHODS: dict[str, Method] = {
    "base": Method(Implementation("stage2_base", "2.1", "STAGE2"), Stage2Config, TVLStage2.of, RegisterLoss),
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
        RegisterLoss,
    ),
    "matryoshka": Method(
        Implementation("stage2_matryoshka", "1", "MATRYOSHKA"),
        MatryoshkaConfig,
        lambda knobs, specs: Matryoshka(specs, knobs),
        MatryoshkaLoss,
    ),
    "disentangled": Method(
        Implementation("stage2_disentangled", "2", "DISENTANGLED"),
        DisentangledConfig,
        lambda knobs, specs: Disentangled(specs, knobs),
        RegisterLoss,
    ),
}
