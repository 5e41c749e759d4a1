"""NestedModel, what all methods share, and RegisterModel: cross-attention to each modality, optional decoders.

Shapes as in tvl_align.contract; M modalities of a batch.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from tvl_align.contract import Batch, Features, FeatureSpec, Output, Reconstruction, Stage2Model, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.registers.blocks import BlockOptions, KeyProjection, RegisterStack, attend_jointly
from tvl_align.registers.copies import join_copies
from tvl_align.registers.decoder import TokenDecoder, reconstruction_error
from tvl_align.registers.nested import NestedMode, draw_kept
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError

MOST_PADDING = 1.5  # times the tokens of all modalities; with more padding they are not attended to at once
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


@dataclass(frozen=True)
class Encoded:
    """Tokens of modalities before nested dropout: over (M, B, No, D), comp (M, B, Nc, D), in the order of `names`.

    Modalities that the batch lacks may be among them. inputs: what `joint` and `reconstruct` of the same model need. extras:
    entries of the output.
    """

    names: Sequence[str]
    over: Tensor
    comp: Tensor
    inputs: Any = None
    extras: dict[str, Any] = field(default_factory=dict)


class NestedModel(nn.Module, Stage2Model):
    """Registers under nested dropout over frozen features. A subclass says how the features become tokens, in `encode`.

    Args:
        stage1: the frozen encoders, or the shapes of their features if the model is used on stored features only.
        knobs: options of the method.
        causal: tokens do not depend on later registers.
        starts: the registers at the start; default: random.
    Raises:
        UserError: N <= No, or causal registers with independent dropout.
    """

    stage1_model: Stage1 | None

    def __init__(
        self,
        stage1: Stage1 | Mapping[str, FeatureSpec],
        knobs: RegisterConfig,
        *,
        causal: bool = False,
        starts: Tensor | None = None,
    ) -> None:
        super().__init__()
        registers, overlapping, dim = knobs.num_register_tokens, knobs.num_overlapping_tokens, knobs.register_token_dim
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
        self.specs = stage1.specs if isinstance(stage1, Stage1) else dict(stage1)
        self.num_overlapping, self.causal = overlapping, causal
        self.nested_rate, self.nested_mode = knobs.nested_dropout_rate, knobs.nested_dropout_mode
        self.registers = nn.Parameter(torch.randn(registers, dim) * 0.02 if starts is None else starts)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `half` etc. call. The frozen encoders follow to another device, and keep their own dtype."""
        super()._apply(fn, recurse)
        if self.stage1_model is not None:
            self.stage1_model.to(self.registers.device)
        return self

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output:
        """Raw inputs or stored features -> Output (tvl_align.contract).

        kept: (B, N) bool nested-dropout mask. None: drawn from torch's global generator in training, all True in
        evaluation. joint: also compute `register_tokens`, which no loss uses.
        """
        features = self.features(batch)
        dropping = kept is not None or self.training
        if kept is None:
            count = len(features)
            kept = self.draw_kept(count) if self.training else torch.ones(count, len(self.registers), dtype=torch.bool)
        kept = kept.to(self.registers.device, non_blocking=True)
        # Causal registers do not depend on later ones, so dropped registers can attend too and are zeroed below.
        encoded = self.encode(features, None if self.causal else kept)
        present, split = {name: m.present for name, m in features.modalities.items()}, self.num_overlapping
        there = torch.stack([present[m] if m in present else torch.zeros_like(kept[:, 0]) for m in encoded.names])
        visible = (there[..., None] & kept)[..., None]  # (M, B, N, 1)
        over, comp = encoded.over * visible[:, :, :split], encoded.comp * visible[:, :, split:]

        def of_batch(found: Mapping[str, Any]) -> dict[str, Any]:
            return {name: found[name] for name in features.modalities if name in found}

        return Output(
            overlapping_tokens=of_batch(dict(zip(encoded.names, over.unbind(0), strict=True))),
            complementary_tokens=of_batch(dict(zip(encoded.names, comp.unbind(0), strict=True))),
            stage1_features={name: m.pooled for name, m in features.modalities.items()},
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            present=present,
            caption_keys=features.caption_keys,
            reconstruction=of_batch(self.reconstruct(encoded, over, comp, kept, features)),
            nested_dropout_mask=kept if dropping else None,
            register_tokens=self.joint(encoded, kept, features) if joint else None,
            features=features,
            extras=encoded.extras,
        )

    @abstractmethod
    def encode(self, features: Features, kept: Tensor | None) -> Encoded:
        """Features -> tokens of every modality. kept (B, N) bool: the registers that may act on others; None: all."""

    @abstractmethod
    def joint(self, encoded: Encoded, kept: Tensor, features: Features) -> Tensor:
        """`register_tokens` (B, N, D): registers that see all present modalities; dropped registers are zero."""

    def reconstruct(
        self, encoded: Encoded, over: Tensor, comp: Tensor, kept: Tensor, features: Features
    ) -> dict[str, Reconstruction]:
        """{modality: error of the frozen tokens rebuilt from the kept registers}; by default none.

        over (M, B, No, D), comp (M, B, Nc, D): after nested dropout. Overlapping tokens get no gradient from this term, so
        only complementary tokens learn what is missing.
        """
        return {}

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
        unknown = [name for name in features.modalities if name not in self.specs]
        if unknown:
            raise UserError(f"this model has no modality {unknown[0]!r}; give it features of {', '.join(self.specs)} only.")
        return checked(features, self.registers)


def alike(specs: Mapping[str, FeatureSpec]) -> list[tuple[str, ...]]:
    """Sets of modalities with features of the same shape, which are computed at once."""
    return [tuple(m for m in specs if specs[m] == spec) for spec in dict.fromkeys(specs.values())]


class RegisterModel(NestedModel):
    """Registers that cross-attend to the frozen features of each modality. All modalities share the registers (queries).

    Modalities with features of the same shape go through their own weights at once (tvl_align.registers.copies).

    Args:
        stage1, knobs, causal: see NestedModel.
        keys: what registers attend to: the token sequence, or one pooled vector per modality.
        share_weights: use the same blocks for every modality.
        preservation: build decoders that reconstruct the frozen tokens.
    Raises:
        UserError: D not divisible by the number of heads, and as NestedModel.
    """

    def __init__(
        self,
        stage1: Stage1 | Mapping[str, FeatureSpec],
        knobs: RegisterConfig,
        *,
        keys: Keys = "tokens",
        share_weights: bool = False,
        causal: bool = False,
        preservation: bool = False,
    ) -> None:
        options = knobs.block()
        super().__init__(stage1, knobs, causal=causal)
        self.key_kind: Keys = keys
        if keys == "pooled":
            self.specs = {m: FeatureSpec(spec.pooled_width, 1, spec.pooled_width) for m, spec in self.specs.items()}
        self.sets = {"-".join(names): names for names in alike(self.specs)}
        spec_of = {of: self.specs[names[0]] for of, names in self.sets.items()}
        layers, count, dim = knobs.num_cross_attn_layers, len(self.registers), options.dim
        self.readers = nn.ModuleDict({of: KeyProjection(spec, dim, len(self.sets[of])) for of, spec in spec_of.items()})
        longest, total = max(s.tokens for s in self.specs.values()), sum(s.tokens for s in self.specs.values())
        self.at_once = share_weights or longest * len(self.specs) <= MOST_PADDING * total
        copies = (
            {"all": 1 if share_weights else len(self.specs)} if self.at_once else {o: len(m) for o, m in self.sets.items()}
        )
        self.stacks = nn.ModuleDict({of: RegisterStack(options, layers, count, causal, n) for of, n in copies.items()})
        decoded = spec_of if preservation else {}
        self.decoders = nn.ModuleDict(
            {of: TokenDecoder(spec, dim, copies=len(self.sets[of])) for of, spec in decoded.items()}
        )
        self.register_load_state_dict_pre_hook(type(self)._join_copies)

    def _join_copies(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Accept checkpoints from before modalities of the same shape had their weights in one module."""
        places = {f"stacks.{of}.": [f"stacks.{m}.0." for m in names] for of, names in self.sets.items()}
        own = [f"stacks.{m}.0." for names in self.sets.values() for m in names]
        places["stacks.all."] = ["stacks.shared.0."] if f"{prefix}stacks.shared.0.norm.weight" in state else own
        for kind in ("readers", "decoders"):
            places |= {f"{kind}.{of}.": [f"{kind}.{m}." for m in names] for of, names in self.sets.items()}
        for new, old in (("norm", "out.0"), ("out", "out.1")):
            places |= {f"decoders.{of}.{new}.": [f"decoders.{m}.{old}." for m in names] for of, names in self.sets.items()}
        join_copies(self, state, prefix, places)

    def inputs(self, modality: Tokens) -> tuple[Tensor, Tensor]:
        """What registers attend to in a modality: (B, T, W) and its mask (B, T)."""
        if self.key_kind == "pooled":
            return modality.pooled[:, None], modality.present[:, None]
        return modality.tokens, modality.mask & modality.present[:, None]

    def encode(self, features: Features, kept: Tensor | None) -> Encoded:
        """Registers attend to each modality separately. A modality that the batch lacks counts as absent in all rows.

        `inputs` of the result: (set, tokens (G, B, T, W), keys (G, B, T, D), mask (G, B, T)) for sets with a modality.
        """
        sets = []
        for of, names in self.sets.items():
            there = {m: self.inputs(features.modalities[m]) for m in names if m in features.modalities}
            if there or self.at_once:
                tokens, mask = side_by_side(there, names, features, self.specs[names[0]])
                sets.append((of, tokens, self.readers[of](tokens), mask))
        found = torch.cat([stack(self.registers, keys, mask, kept) for stack, keys, mask in self._attended(sets)])
        order, split = [m for of, *_ in sets for m in self.sets[of]], self.num_overlapping
        return Encoded(order, found[:, :, :split], found[:, :, split:], sets)

    def joint(self, encoded: Encoded, kept: Tensor, features: Features) -> Tensor:
        stacks, keys, masks = zip(*self._attended(encoded.inputs), strict=True)
        return attend_jointly(stacks, self.registers, keys, masks, kept)

    def _attended(self, sets: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> list[tuple[RegisterStack, Tensor, Tensor]]:
        """Stacks with the keys and masks that they attend to: all modalities at once, shorter ones padded, or set by set."""
        if not self.at_once:
            return [(cast(RegisterStack, self.stacks[of]), keys, mask) for of, _, keys, mask in sets]
        longest = max(keys.shape[2] for _, _, keys, _ in sets)
        keys = [F.pad(k, (0, 0, 0, longest - k.shape[2])) if k.shape[2] < longest else k for _, _, k, _ in sets]
        masks = [F.pad(m, (0, longest - m.shape[2])) if m.shape[2] < longest else m for *_, m in sets]
        return [(cast(RegisterStack, self.stacks["all"]), torch.cat(keys), torch.cat(masks))]

    def reconstruct(
        self, encoded: Encoded, over: Tensor, comp: Tensor, kept: Tensor, features: Features
    ) -> dict[str, Reconstruction]:
        found: dict[str, Reconstruction] = {}
        if not self.decoders:
            return found
        z = torch.cat([over.detach(), comp], dim=2).split([len(tokens) for _, tokens, *_ in encoded.inputs])
        for (of, tokens, _, mask), registers in zip(encoded.inputs, z, strict=True):
            both = reconstruction_error(self.decoders[of](registers, kept, tokens.shape[2]), tokens, mask)
            parts = zip(both.error.unbind(0), both.mask.unbind(0), strict=True)
            found |= {m: Reconstruction(*part) for m, part in zip(self.sets[of], parts, strict=True)}
        return found


def side_by_side(
    there: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str], features: Features, spec: FeatureSpec
) -> tuple[Tensor, Tensor]:
    """{modality: (tokens (B, T, W), mask (B, T))} -> tokens (G, B, T, W) and masks (G, B, T) of the G modalities `names`.

    Shorter sequences are padded. A modality that is not in `there` is zero, with a mask that is False.
    """
    if len(names) == len(there) == 1:
        return next((tokens[None], mask[None]) for tokens, mask in there.values())
    rows, device = len(features), features.rows.device
    length = max((mask.shape[1] for _, mask in there.values()), default=1)
    blank = torch.zeros(rows, 0, spec.width, device=device), torch.zeros(rows, 0, dtype=torch.bool, device=device)
    parts = [there.get(m, blank) for m in names]
    tokens = [F.pad(x, (0, 0, 0, length - x.shape[1])) if x.shape[1] < length else x for x, _ in parts]
    masks = [F.pad(m, (0, length - m.shape[1])) if m.shape[1] < length else m for _, m in parts]
    return torch.stack(tokens), torch.stack(masks)
