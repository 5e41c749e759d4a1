"""RegisterModel, the model that all methods share: registers, cross-attention to each modality, optional decoders.

Shapes as in tvl_align.contract.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from tvl_align.contract import Batch, Features, FeatureSpec, Output, Reconstruction, Stage2Model, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.registers.blocks import BlockOptions, KeyProjection, RegisterStack, attend_jointly
from tvl_align.registers.decoder import TokenDecoder, reconstruction_error
from tvl_align.registers.nested import NestedMode, draw_kept
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError

MAX_LOGIT_SCALE = math.log(100)  # CLIP (Radford et al. 2021, arXiv:2103.00020) clamps the logit scale at 100


def checked(features: Features, registers: Tensor) -> Features:
    """The features of a model's input in float32. registers: weights of the model.

    Raises UserError for a batch without rows and for a model whose weights were cast to another dtype.
    """
    if len(features) == 0:
        raise UserError("the batch has no rows; leave it out.")
    if registers.dtype != torch.float32:
        name = str(registers.dtype).removeprefix("torch.")
        raise UserError(
            f"the weights of the model are {name}; keep them float32 and wrap the forward pass in torch.autocast."
        )
    return features.float()


@dataclass(frozen=True)
class RegisterConfig:
    """The registers and their loss: options that every method has."""

    num_register_tokens: int = 4
    """Number of registers."""
    num_overlapping_tokens: int = 3
    """Number of leading registers that are aligned across modalities; the rest are complementary."""
    register_token_dim: int = 768
    """Width of a register."""
    num_cross_attn_layers: int = 2
    """Number of cross-attention blocks between the registers and the frozen tokens."""
    num_heads: int = 8
    """Attention heads; must divide --register_token_dim."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, as a multiple of the register width."""
    drop_rate: float = 0.0
    """Dropout probability of projections and MLPs."""
    attn_drop_rate: float = 0.0
    """Dropout probability of attention weights."""
    drop_path_rate: float = 0.0
    """Stochastic depth: drop probability of every residual branch."""
    nested_dropout_rate: float = 0.5
    """Drop probability of the last register; rises linearly from 0 at the first."""
    nested_dropout_mode: NestedMode = "nested"
    """nested: the kept registers are always a prefix; independent: each register is dropped independently."""
    complementary_reg_weight: float = 0.01
    """Weight of the L2-norm and diversity penalties on complementary tokens."""
    preservation_weight: float = 0.0
    """Weight of the error of reconstructing the frozen tokens from all registers; 0: exactly the documented loss."""
    disable_vision_text_loss: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave the vision-text pair out of the loss."""
    disable_tactile_text_loss: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave the tactile-text pair out of the loss."""

    def __post_init__(self) -> None:
        at_least(1, self, "num_register_tokens", "num_overlapping_tokens", "register_token_dim", "num_heads")
        at_least(self._least_layers, self, "num_cross_attn_layers")
        at_least(0, self, "mlp_ratio", "complementary_reg_weight", "preservation_weight")
        between(0, 1, self, "drop_rate", "attn_drop_rate", "drop_path_rate", below=True)
        between(0, 1, self, "nested_dropout_rate")

    @property
    def _least_layers(self) -> int:
        """The smallest number of cross-attention blocks that a method works with."""
        return 1

    def block(self, width: int | None = None) -> BlockOptions:
        """Options of a register block; width: default the register width."""
        rates = self.drop_rate, self.attn_drop_rate, self.drop_path_rate
        return BlockOptions(width or self.register_token_dim, self.num_heads, self.mlp_ratio, *rates)


Keys = Literal["tokens", "pooled"]


class RegisterModel(nn.Module, Stage2Model):
    """Registers that attend to frozen features.

    Args:
        stage1: the frozen encoders, or the shapes of their features. The encoders are not a submodule: their weights are
            neither in `state_dict` nor in an optimizer. They follow the model to another device.
        knobs: number, width and dropout of the registers.
        keys: what registers attend to: the token sequence, or one pooled vector per modality.
        share_weights: use the same blocks for every modality; "overlapping": those of overlapping registers only.
        separate_groups: give overlapping and complementary registers separate block stacks, without attention between them.
        causal: a register does not attend to later registers.
        width: width of the blocks; default: the register width D. Other widths need an `expand`, see `attend`.
        preservation: build decoders that reconstruct the frozen tokens.
    Raises:
        UserError: N <= No, D not divisible by the number of heads, or causal registers with independent dropout.
    """

    stage1_model: Stage1 | None

    def __init__(
        self,
        stage1: Stage1 | Mapping[str, FeatureSpec],
        knobs: RegisterConfig,
        *,
        keys: Keys = "tokens",
        share_weights: bool | Literal["overlapping"] = False,
        separate_groups: bool = False,
        causal: bool = False,
        preservation: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        registers, overlapping, options = knobs.num_register_tokens, knobs.num_overlapping_tokens, knobs.block(width)
        if not 0 < overlapping < registers:
            raise UserError(
                f"{registers} registers cannot hold {overlapping} overlapping tokens and a complementary one; "
                "give --num_register_tokens a larger number than --num_overlapping_tokens (at least 1)."
            )
        if causal and knobs.nested_dropout_mode != "nested":
            raise UserError(
                "causal registers need --nested_dropout_mode nested, because later ones would still attend to a dropped one."
            )
        frozen = stage1 if isinstance(stage1, Stage1) else None
        object.__setattr__(self, "stage1_model", frozen)  # not registered as a submodule, so it has no parameters here
        specs = stage1.specs if isinstance(stage1, Stage1) else dict(stage1)
        self.num_overlapping, self.key_kind, self.causal = overlapping, keys, causal
        self.nested_rate, self.nested_mode = knobs.nested_dropout_rate, knobs.nested_dropout_mode
        self.registers = nn.Parameter(torch.randn(registers, knobs.register_token_dim) * 0.02)
        self.query = nn.Linear(knobs.register_token_dim, width) if width is not None else nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if keys == "pooled":
            specs = {m: FeatureSpec(spec.pooled_width, 1, spec.pooled_width) for m, spec in specs.items()}
        self.specs = dict(specs)
        self.readers = self._make_readers(options.dim)
        self.groups = [slice(0, overlapping), slice(overlapping, registers)] if separate_groups else [slice(0, registers)]
        layers = knobs.num_cross_attn_layers
        sizes = [g.stop - g.start for g in self.groups]
        common = 1 if share_weights == "overlapping" else len(sizes) if share_weights else 0  # leading groups
        self.stacks = nn.ModuleDict(
            {
                owner: nn.ModuleList(RegisterStack(options, layers, size, causal) for size in of_owner)
                for owner, of_owner in {"shared": sizes[:common], **dict.fromkeys(specs, sizes[common:])}.items()
                if of_owner
            }
        )
        decoders = {m: TokenDecoder(spec, knobs.register_token_dim) for m, spec in specs.items()} if preservation else {}
        self.decoders = nn.ModuleDict(decoders)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `half` etc. call. The frozen encoders follow to another device, and keep their own dtype."""
        super()._apply(fn, recurse)
        if self.stage1_model is not None:
            self.stage1_model.to(self.registers.device)
        return self

    def _make_readers(self, width: int) -> nn.ModuleDict:
        """Modules that map the tokens of a modality to keys of the blocks' width."""
        return nn.ModuleDict({m: KeyProjection(spec, width) for m, spec in self.specs.items()})

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output:
        """Raw inputs or stored features -> Output (tvl_align.contract).

        kept: (B, N) bool nested-dropout mask. None: drawn from torch's global generator in training, all True in
        evaluation. joint: also compute `register_tokens`, which no loss uses.
        """
        features = self.features(batch)
        dropping = kept is not None or self.training
        if kept is None:
            kept = torch.ones(len(features), len(self.registers), dtype=torch.bool)
            if self.training:
                kept = self.draw_kept(len(features))
        kept = kept.to(self.registers.device)
        names = list(features.modalities)
        tokens, masks = zip(*(self.inputs(name, features.modalities[name]) for name in names), strict=True)
        keys = [self.keys(name, t) for name, t in zip(names, tokens, strict=True)]
        key_masks = [m.expand(-1, k.shape[-2]) if m.shape[1] == 1 else m for m, k in zip(masks, keys, strict=True)]
        # Causal registers do not depend on later ones, so dropped registers can attend too and are zeroed below.
        attending = torch.ones_like(kept) if self.causal else kept
        needed = kept if self.training else None  # in training a group of dropped registers is not used
        attended = self.attend_each(names, keys, key_masks, attending, needed)
        split = self.num_overlapping
        over, comp = {n: z[:, :split] for n, z in attended.items()}, {n: z[:, split:] for n, z in attended.items()}
        over, comp, extras = self.postprocess(over, comp, dict(zip(names, tokens, strict=True)), features)
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
                n: self.reconstruct(n, over[n], comp[n], kept, t, m, features.modalities[n])
                for n, t, m in zip(names, tokens, masks, strict=True)
                if n in self.decoders
            },
            nested_dropout_mask=kept if dropping else None,
            register_tokens=self.expand(self.attend(names, keys, key_masks, kept)) if joint else None,
            features=features,
            extras=extras,
        )

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a nested-dropout mask for training: (B, N) bool, True = kept."""
        return draw_kept(batch, len(self.registers), self.nested_rate, self.nested_mode, generator)

    def features(self, batch: Batch | Features) -> Features:
        """Return stored features, or encode raw inputs with the frozen encoders; floats become float32.

        Raises UserError for raw inputs without encoders, for unknown modalities and as `checked` does.
        """
        if isinstance(batch, Features):
            features = batch
        elif self.stage1_model is not None:
            features = self.stage1_model.encode(batch)
        else:
            raise UserError(
                "this model was built for stored features; to encode raw inputs, build it with a Stage-1 model: "
                f"{type(self).__name__}(stage1, ...)."
            )
        unknown = [name for name in features.modalities if name not in self.readers]
        if unknown:
            known = ", ".join(self.readers)
            raise UserError(f"this model has no modality {unknown[0]!r}; give it features of {known} only.")
        return checked(features, self.registers)

    def inputs(self, name: str, modality: Tokens) -> tuple[Tensor, Tensor]:
        """What registers attend to in a modality, before it is projected to keys: (B, T, W) and its mask (B, T)."""
        if self.key_kind == "pooled":
            return modality.pooled[:, None], modality.present[:, None]
        return modality.tokens, modality.mask & modality.present[:, None]

    def keys(self, name: str, tokens: Tensor) -> Tensor:
        """What registers attend to, from what `inputs` gives: (B, T, D), or (B, groups, T, D) with keys for every group."""
        return self.readers[name](tokens)

    def attend(
        self, names: list[str], keys: list[Tensor], masks: list[Tensor], kept: Tensor, needed: Tensor | None = None
    ) -> Tensor:
        """Let the registers attend to all named modalities at once: (B, N, D); dropped registers are zero.

        keys: per modality (B, T, D), or (B, groups, T, D) with keys of its own for every group of registers.
        needed: (B, N) bool. In rows where no register of a group is needed, the whole group is skipped and left at zero.
        """
        present, queries = [mask.any(1) for mask in masks], self.query(self.registers)
        owners = [self._stacks_of(name) for name in names]
        parts = []
        for i, g in enumerate(self.groups):
            stacks = [owner[i] for owner in owners]
            group_keys = [k[:, i] if k.ndim == 4 else k for k in keys]
            rows_needed = None if needed is None or len(self.groups) == 1 else needed[:, g].any(1)
            if rows_needed is None or rows_needed.all():
                parts.append(attend_jointly(stacks, queries[g], group_keys, masks, kept[:, g], present))
                continue
            rows_needed[0] = True  # so that every parameter has a gradient on every process
            at = rows_needed.nonzero().squeeze(1)
            inputs = (
                [k.index_select(0, at) for k in group_keys],
                [m[at] for m in masks],
                kept[at][:, g],
                [p[at] for p in present],
            )
            z = attend_jointly(stacks, queries[g], *inputs)
            parts.append(z.new_zeros(len(kept), *z.shape[1:]).index_copy(0, at, z))
        return torch.cat(parts, dim=1)

    def attend_each(
        self, names: list[str], keys: list[Tensor], masks: list[Tensor], kept: Tensor, needed: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Let the registers attend to each modality separately: {modality: (B, N, D)}.

        If all blocks are shared the modalities form one batch, with shorter sequences padded. needed: as in `attend`.
        """
        if list(self.stacks) != ["shared"] or len(names) == 1:
            return {n: self.attend([n], [k], [m], kept, needed) for n, k, m in zip(names, keys, masks, strict=True)}
        longest = max(k.shape[-2] for k in keys)
        joined = torch.cat([F.pad(k, (0, 0, 0, longest - k.shape[-2])) for k in keys])
        mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in masks])
        needed = needed.repeat(len(names), 1) if needed is not None else None
        attended = self.attend(names[:1], [joined], [mask], kept.repeat(len(names), 1), needed)
        return dict(zip(names, attended.chunk(len(names)), strict=True))

    def _stacks_of(self, modality: str) -> list[RegisterStack]:
        """The stack of every group of registers, shared ones first."""
        owners = (self.stacks[o] for o in ("shared", modality) if o in self.stacks)
        return [cast(RegisterStack, stack) for owner in owners for stack in cast(nn.ModuleList, owner)]

    def expand(self, z: Tensor) -> Tensor:
        """Registers (B, N, width of the blocks) -> (B, N, D); by default unchanged."""
        return z

    def postprocess(
        self, over: dict[str, Tensor], comp: dict[str, Tensor], inputs: dict[str, Tensor], features: Features
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Map attended registers, overlapping (B, No, width) and complementary (B, Nc, width), to tokens of width D.

        inputs: what was attended to, as from `inputs`. Also returns extra entries of the output. By default unchanged.
        """
        return over, comp, {}

    def reconstruct(
        self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor, frozen: Tokens
    ) -> Reconstruction:
        """Reconstruct the frozen tokens of a modality from all registers.

        Overlapping tokens get no gradient from this term, so only complementary tokens learn what is missing.
        """
        memory = torch.cat([over.detach(), comp], dim=1)
        return reconstruction_error(self.decoders[name](memory, kept, tokens.shape[1]), tokens, mask)
