"""The model that methods share: registers, one reading of each modality, an optional decoder. A method is a setting of it.

Shapes as in tvl_align.contract.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import Batch, Features, FeatureSpec, Output, Reconstruction, Stage2Model, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.registers.blocks import BlockOptions, KeyReader, RegisterStack, attend_jointly
from tvl_align.registers.decoder import TokenDecoder, reconstruction_error
from tvl_align.registers.nested import NestedMode, draw_kept
from tvl_align.system.console import UserError

MAX_LOGIT_SCALE = math.log(100)  # CLIP (Radford et al. 2021, arXiv:2103.00020) clamps the temperature here


@dataclass(frozen=True)
class RegisterConfig:
    """The registers and their loss: the knobs every method has."""

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
    preservation_weight: float = 0.0
    """Weight of rebuilding the frozen tokens from all registers; 0: the documented formula exactly."""
    disable_vision_text_loss: bool = False
    """Leave the pair vision-text out of the loss."""
    disable_tactile_text_loss: bool = False
    """Leave the pair tactile-text out of the loss."""

    @property
    def block(self) -> BlockOptions:
        """The shape of a register block."""
        rates = self.drop_rate, self.attn_drop_rate, self.drop_path_rate
        return BlockOptions(self.register_token_dim, self.num_heads, self.mlp_ratio, *rates)


Keys = Literal["tokens", "pooled"]


class RegisterModel(nn.Module, Stage2Model):
    """Registers over frozen features.

    stage1: the frozen encoders, or the shapes of their features. It is never a sub-module: no weights of it in
    `state_dict`, none in an optimizer. knobs: how many registers, how wide, how dropped. keys: what registers attend to,
    the token sequence or the one pooled vector. share_weights: the same blocks for every modality. separate_groups: a
    block stack of its own for overlapping and complementary registers, which then never see each other. causal: a
    register sees no later one. preservation: build decoders of the frozen tokens.
    Raises UserError: N <= No, a width that the heads do not divide, causal registers with gaps between them.
    """

    def __init__(
        self,
        stage1: Stage1 | Mapping[str, FeatureSpec],
        knobs: RegisterConfig,
        *,
        keys: Keys = "tokens",
        share_weights: bool = False,
        separate_groups: bool = False,
        causal: bool = False,
        preservation: bool = False,
    ) -> None:
        super().__init__()
        registers, overlapping, options = knobs.num_register_tokens, knobs.num_overlapping_tokens, knobs.block
        if not 0 < overlapping < registers:
            raise UserError(
                f"{registers} registers cannot hold {overlapping} overlapping tokens and a complementary one; "
                "give --num_register_tokens a larger number than --num_overlapping_tokens (at least 1)."
            )
        if causal and knobs.nested_dropout_mode != "nested":
            raise UserError("causal registers need --nested_dropout_mode nested: a gap would still be seen by later ones.")
        frozen = stage1 if isinstance(stage1, Stage1) else None
        object.__setattr__(self, "stage1_model", frozen)  # not registered: frozen weights are nobody's parameters here
        specs = frozen.specs if frozen is not None else dict(stage1)
        self.num_overlapping, self.key_kind, self.causal = overlapping, keys, causal
        self.nested_rate, self.nested_mode = knobs.nested_dropout_rate, knobs.nested_dropout_mode
        self.registers = nn.Parameter(torch.randn(registers, options.dim) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if keys == "pooled":
            specs = {m: FeatureSpec(spec.pooled_width, 1, spec.pooled_width) for m, spec in specs.items()}
        self.specs = dict(specs)
        self.readers = nn.ModuleDict({m: KeyReader(spec, options.dim) for m, spec in specs.items()})
        self.groups = [slice(0, overlapping), slice(overlapping, registers)] if separate_groups else [slice(0, registers)]
        owners = ["shared"] if share_weights else list(specs)
        layers = knobs.num_cross_attn_layers
        sizes = [g.stop - g.start for g in self.groups]
        self.stacks = nn.ModuleDict(
            {o: nn.ModuleList(RegisterStack(options, layers, size, causal) for size in sizes) for o in owners}
        )
        decoders = {m: TokenDecoder(spec, options.dim) for m, spec in specs.items()} if preservation else {}
        self.decoders = nn.ModuleDict(decoders)

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
        names = list(features.modalities)
        tokens, masks = zip(*(self._keys(features.modalities[name]) for name in names), strict=True)
        keys = [self.readers[name](t) for name, t in zip(names, tokens, strict=True)]
        # With causal registers a prefix is what it is whether or not later ones are read, so all of them are.
        reading = torch.ones_like(kept) if self.causal else kept
        needed = kept if self.training else None  # in training nothing reads a group of registers where all are dropped
        read = self.attend_each(names, keys, list(masks), reading, needed)
        split = self.num_overlapping
        over, comp = {n: z[:, :split] for n, z in read.items()}, {n: z[:, split:] for n, z in read.items()}
        over, comp = self.postprocess(over, comp, features)
        over = {n: z * kept[:, :split, None].to(z.dtype) for n, z in over.items()}
        comp = {n: z * kept[:, split:, None].to(z.dtype) for n, z in comp.items()}
        return Output(
            overlapping_tokens=over,
            complementary_tokens=comp,
            stage1_features={name: m.pooled for name, m in features.modalities.items()},
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            present={name: m.present for name, m in features.modalities.items()},
            caption_keys=features.caption_keys,
            reconstruction={
                n: self.reconstruct(n, over[n], comp[n], kept, t, m)
                for n, t, m in zip(names, tokens, masks, strict=True)
                if n in self.decoders
            },
            nested_dropout_mask=kept if dropping else None,
            register_tokens=self.attend(names, keys, masks, kept) if joint else None,
            features=features,
        )

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

    def _keys(self, modality: Tokens) -> tuple[Tensor, Tensor]:
        if self.key_kind == "pooled":
            return modality.pooled[:, None], modality.present[:, None]
        return modality.tokens, modality.mask & modality.present[:, None]

    def attend(
        self, names: list[str], keys: list[Tensor], masks: list[Tensor], kept: Tensor, needed: Tensor | None = None
    ) -> Tensor:
        """Registers that attend to the named modalities, to all of them at once: (B, N, D), dropped ones zero.

        needed: (B, N) bool; a group of registers is left at zero in rows where none of it is needed.
        """
        present = [mask.any(1) for mask in masks]
        owners = [self.stacks["shared" if "shared" in self.stacks else name] for name in names]
        parts = []
        for i, g in enumerate(self.groups):
            stacks = [owner[i] for owner in owners]
            some = None if needed is None or len(self.groups) == 1 else needed[:, g].any(1)
            if some is None or some.all():
                parts.append(attend_jointly(stacks, self.registers[g], keys, masks, kept[:, g], present))
                continue
            some[0] = True  # so that every parameter has a gradient on every process
            at = some.nonzero().squeeze(1)
            inputs = [k.index_select(0, at) for k in keys], [m[at] for m in masks], kept[at][:, g], [p[at] for p in present]
            z = attend_jointly(stacks, self.registers[g], *inputs)
            parts.append(z.new_zeros(len(kept), *z.shape[1:]).index_copy(0, at, z))
        return torch.cat(parts, dim=1)

    def attend_each(
        self, names: list[str], keys: list[Tensor], masks: list[Tensor], kept: Tensor, needed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Registers that attend to one modality at a time: {modality: (B, N, D)}. With shared blocks all go through as one
        batch, shorter sequences padded."""
        if "shared" not in self.stacks or len(names) == 1:
            return {n: self.attend([n], [k], [m], kept, needed) for n, k, m in zip(names, keys, masks, strict=True)}
        longest = max(k.shape[1] for k in keys)
        joined = torch.cat([F.pad(k, (0, 0, 0, longest - k.shape[1])) for k in keys])
        mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in masks])
        needed = needed.repeat(len(names), 1) if needed is not None else None
        read = self.attend(names[:1], [joined], [mask], kept.repeat(len(names), 1), needed)
        return dict(zip(names, read.chunk(len(names)), strict=True))

    def postprocess(
        self, over: dict[str, Tensor], comp: dict[str, Tensor], features: Features
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What becomes of overlapping and complementary tokens after they were read; here nothing."""
        return over, comp

    def reconstruct(
        self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor
    ) -> Reconstruction:
        """Overlapping tokens are given to the decoder but not changed by it: what they lack, complementary ones hold."""
        memory = torch.cat([over.detach(), comp], dim=1)
        return reconstruction_error(self.decoders[name](memory, kept, tokens.shape[1]), tokens, mask)
