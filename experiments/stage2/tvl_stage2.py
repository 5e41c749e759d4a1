"""TVLStage2, the base model: registers of a few tokens on top of the frozen Stage 1.

Each modality is read separately: its own key reader, and by default its own blocks (`share_weights` ties them). The
registers are shared: the same learnable queries ask every modality. The first `num_overlapping_tokens` are aligned
across modalities by the loss, the rest are complementary.

Experiment ID stage2_base, version 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvl_align.console import UserError
from tvl_align.contract import Batch, Features, FeatureSpec, Output, Reconstruction
from tvl_align.encoders.tvl import Stage1
from tvl_align.losses import MAX_LOGIT_SCALE
from tvl_align.nested import NestedMode, draw_kept
from tvl_align.registers import BlockOptions, KeyReader, RegisterStack, TokenDecoder, joint_read, token_target


@dataclass(frozen=True)
class Stage2Config:
    """The registers and their loss."""

    num_register_tokens: int = 4
    """Registers in all."""
    num_overlapping_tokens: int = 3
    """The first so many registers are aligned across modalities; the rest is complementary."""
    register_token_dim: int = 768
    """Width of a register."""
    num_cross_attn_layers: int = 2
    """Blocks through which registers read the frozen tokens."""
    num_heads: int = 8
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in register widths."""
    drop_rate: float = 0.0
    """Dropout probability of projections and MLPs."""
    attn_drop_rate: float = 0.0
    """Dropout probability of attention weights."""
    drop_path_rate: float = 0.0
    """Stochastic-depth probability of every residual branch."""
    nested_dropout_rate: float = 0.5
    """Drop probability of the last register; it rises linearly from 0 for the first."""
    nested_dropout_mode: NestedMode = "nested"
    """nested: what is kept is always a prefix; independent: every register is drawn alone."""
    complementary_reg_weight: float = 0.01
    """Weight of the L2 norm and diversity penalty on complementary tokens."""
    preservation_weight: float = 1.0
    """Weight of rebuilding the frozen tokens from all registers; 0: the documented formula exactly."""
    disable_vision_text_loss: bool = False
    """Leave the pair vision-text out of the loss."""
    disable_tactile_text_loss: bool = False
    """Leave the pair tactile-text out of the loss."""
    share_weights: bool = False
    """Use the same blocks for every modality."""


class TVLStage2(nn.Module):
    """Registers over frozen features.

    Args:
        stage1_model: the frozen encoders, or the shapes of their features ({modality: FeatureSpec}) where only stored
            features are read. It is never a sub-module: no weights of it in `state_dict`, none in an optimizer.
        num_register_tokens: N; num_overlapping_tokens: No < N, the rest is complementary.
        register_token_dim: D, divisible by num_heads.
        nested_dropout_rate: drop probability of the last register (see tvl_align.nested).
        preservation: build the decoders that the preservation term of the loss needs.
        share_weights: tie the blocks of all modalities.
    Raises:
        UserError: N <= No, or D not divisible by the heads.
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
    ) -> None:
        super().__init__()
        if not 0 < num_overlapping_tokens < num_register_tokens:
            raise UserError(
                f"{num_register_tokens} registers cannot hold {num_overlapping_tokens} overlapping tokens and a "
                "complementary one; give --num_register_tokens a larger number than --num_overlapping_tokens (at least 1)."
            )
        options = BlockOptions(register_token_dim, num_heads, mlp_ratio, drop_rate, attn_drop_rate, drop_path_rate)
        frozen = stage1_model if isinstance(stage1_model, Stage1) else None
        object.__setattr__(self, "stage1_model", frozen)  # not registered: frozen weights are nobody's parameters here
        specs = frozen.specs if frozen is not None else dict(stage1_model)
        self.num_overlapping = num_overlapping_tokens
        self.nested_rate, self.nested_mode = nested_dropout_rate, nested_dropout_mode
        self.registers = nn.Parameter(torch.randn(num_register_tokens, register_token_dim) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.readers = nn.ModuleDict({m: KeyReader(spec, register_token_dim) for m, spec in specs.items()})
        stacks = ["shared"] if share_weights else list(specs)
        self.stacks = nn.ModuleDict({name: RegisterStack(options, num_cross_attn_layers) for name in stacks})
        decoders = {m: TokenDecoder(spec, register_token_dim) for m, spec in specs.items()} if preservation else {}
        self.decoders = nn.ModuleDict(decoders)

    def stack(self, modality: str) -> RegisterStack:
        return self.stacks["shared" if "shared" in self.stacks else modality]

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output:
        """Raw inputs or stored features -> Output (tvl_align.contract).

        kept: (B, N) bool nested-dropout mask. None: drawn in training (from torch's global generator), all kept in
        evaluation. joint: also compute `register_tokens`, which no loss reads.
        """
        features = self.features(batch)
        dropping = kept is not None or self.training
        if kept is None:
            kept = torch.ones(len(features), len(self.registers), dtype=torch.bool)
            if self.training:
                kept = self.draw_kept(len(features))
        kept = kept.to(self.registers.device)
        tokens = {name: m.tokens for name, m in features.modalities.items()}
        keys = {name: self.readers[name](t) for name, t in tokens.items()}
        masks = {name: m.mask & m.present[:, None] for name, m in features.modalities.items()}
        registers = {name: self.stack(name)(self.registers, keys[name], masks[name], kept) for name in keys}
        split = self.num_overlapping
        output: Output = {
            "overlapping_tokens": {name: z[:, :split] for name, z in registers.items()},
            "complementary_tokens": {name: z[:, split:] for name, z in registers.items()},
            "stage1_features": {name: m.pooled for name, m in features.modalities.items()},
            "logit_scale": self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            "present": {name: m.present for name, m in features.modalities.items()},
            "caption_keys": features.caption_keys,
            "features": features,
            "reconstruction": {
                name: self._reconstruct(name, z, kept, tokens[name], masks[name])
                for name, z in registers.items()
                if name in self.decoders
            },
        }
        if dropping:
            output["nested_dropout_mask"] = kept
        if joint:
            names = list(keys)
            stacks, present = [self.stack(n) for n in names], [features.modalities[n].present for n in names]
            parts = [keys[n] for n in names], [masks[n] for n in names]
            output["register_tokens"] = joint_read(stacks, self.registers, *parts, kept, present)
        return output

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) bool: a nested-dropout mask for training."""
        return draw_kept(batch, len(self.registers), self.nested_rate, self.nested_mode, generator)

    def features(self, batch: Batch | Features) -> Features:
        """What the registers read: features as they are, raw inputs through the frozen encoders; always float32."""
        if not isinstance(batch, Features):
            if self.stage1_model is None:
                raise UserError("this model was built for stored features; give it a Stage-1 model to encode raw inputs.")
            batch = self.stage1_model.encode(batch)
        unknown = [name for name in batch.modalities if name not in self.readers]
        if unknown:
            raise UserError(f"modality {unknown[0]!r} is not one this model was built for: {', '.join(self.readers)}.")
        return batch.float()

    def _reconstruct(self, name: str, z: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
        # Overlapping tokens are given to the decoder but not changed by it: what they lack, complementary ones must hold.
        split = self.num_overlapping
        memory = torch.cat([z[:, :split].detach(), z[:, split:]], dim=1)
        predicted = self.decoders[name](memory, kept, tokens.shape[1])
        return Reconstruction(predicted, token_target(tokens), mask)
