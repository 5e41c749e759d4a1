"""stage2_base v5.0. TVLStage2, the base model: register tokens that separate shared from unique information.

1. The frozen tokens of a modality are read as principal components (tvl_align.registers.principal).
2. A trunk, a residual MLP with the same weights for all modalities, reads the components through a linear projection per
   modality, and overlapping registers attend to what it makes of them; their stack is shared too. The projections read with
   dropout and start equal for what Stage 1 has aligned: in weights of its own a modality memorises what is unique to it.
3. Each token is a narrow code (tvl_align.methods.codes). Of three modalities, units of later overlapping tokens belong to
   pairs, for what the third lacks. Prefixes are aligned with the probability that nested dropout keeps them: the expected
   loss instead of a sample, and no row is compared with shorter ones.
4. Complementary codes start at the principal components of what canonical correlations leave (tvl_align.methods.canonical),
   and have few discrete levels (finite scalar quantisation, Mentzer et al. 2023, arXiv:2309.15505), so that small traces
   cannot hide in them. A decoder rebuilds the components from both codes; only the complementary ones get its gradients.
5. Critics try to tell from the complementary code of a modality which row the OTHER modalities' overlapping codes belong to;
   the code is trained so that they cannot (tvl_align.losses.independence).

Training and evaluation compute the same codes; only noise and dropout are absent in evaluation.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.func import functional_call

from tvl_align.contract import MODALITIES, Features, FeatureSpec, Implementation, Method, Output, Reconstruction, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.losses.alignment import prefix_alignment
from tvl_align.losses.independence import independence
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.methods.canonical import canonical, residual_components
from tvl_align.methods.codes import CodeConfig, Codes, dropped
from tvl_align.registers.model import RegisterModel
from tvl_align.registers.nested import NestedMode, prefix_probabilities
from tvl_align.registers.principal import component_count
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError

log = logging.getLogger(__name__)
START = 0.1  # scale of what registers add to the linear projections at the start
COMPONENTS_START = 0.3  # scale of the trunk's projections of components at the start, beside those of pooled features
CRITIC_WIDTH = 128
DECODER_WIDTH = 256


@dataclass(frozen=True)
class Stage2Config(CodeConfig):
    """The registers and their loss."""

    units: int = 32
    """Units of all overlapping tokens; the first token holds half of them, the others share the rest."""
    num_cross_attn_layers: int = 1
    """Number of cross-attention blocks between the registers and the keys; 0: registers attend to nothing (an ablation)."""
    preservation_weight: float = 1.0
    """Weight of the error of rebuilding the frozen tokens from all registers; 0: no decoders."""
    independence_weight: float = 0.3
    """Weight of what critics tell of the other modalities from complementary tokens; 0: no critics."""
    share_weights: bool = False
    """Use the same blocks for every modality in complementary registers too."""
    block_width: int = 64
    """Width of the blocks; narrow ones learn faster. Must be divisible by --num_heads."""
    trunk_width: int = 128
    """Width of the trunk that overlapping registers attend to."""
    trunk_layers: int = 2
    """Residual MLPs of the trunk."""
    num_keys: int = 8
    """Keys that each group of registers attends to in a modality."""
    levels: int = 5
    """Levels of a unit of a complementary token, an odd number."""
    critics: int = 2
    """Critics of each complementary code."""
    linear: bool = True
    """Add linear projections to what registers have attended to: of the trunk for overlapping codes, of the components, with
    a start at the closed form, for complementary ones."""
    pair_units: bool = True
    """With three modalities or more, units of all overlapping tokens but the first belong to pairs of modalities in turn:
    for what a third one lacks, where they are zero."""
    input_dropout: float = 0.2
    """Dropout probability of the components that the trunk reads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "block_width", "trunk_width", "num_keys", "critics")
        at_least(0, self, "trunk_layers", "independence_weight")
        between(0, 1, self, "input_dropout", below=True)
        if self.levels < 3 or self.levels % 2 == 0:
            raise UserError(f"--levels {self.levels} has no level at 0 or only that one; give an odd number from 3 on.")

    @property
    def _least_layers(self) -> int:
        return 0 if self.linear else 1


DEFAULTS = Stage2Config()


def model_options(knobs: Stage2Config) -> dict[str, Any]:
    """The arguments of TVLStage2 for the options of a run, without those of the loss and of subclasses."""
    of_loss = ("complementary_reg_weight", "preservation_weight", "disable_vision_text_loss", "disable_tactile_text_loss")
    options = {f.name: getattr(knobs, f.name) for f in fields(Stage2Config) if f.name not in of_loss}
    return options | {"preservation": knobs.preservation_weight > 0}


class Trunk(nn.Module):
    """Components of a modality (B, K) -> (B, W): a projection per modality, and residual MLPs that all modalities share.

    sizes {modality: K}: components, the last E of them the pooled feature. Where modalities agree in E, the projections of
    their pooled features start equal, so that features aligned by Stage 1 stay aligned.
    """

    def __init__(self, sizes: Mapping[str, int], specs: Mapping[str, FeatureSpec], knobs: Stage2Config) -> None:
        super().__init__()
        self.project = nn.ModuleDict({m: nn.Linear(k, knobs.trunk_width) for m, k in sizes.items()})
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(knobs.trunk_width), Mlp(knobs.trunk_width, 4 * knobs.trunk_width))
            for _ in range(knobs.trunk_layers)
        )
        self.norm = nn.LayerNorm(knobs.trunk_width)
        self.dropout = knobs.input_dropout
        first: dict[int, nn.Linear] = {}
        for m, spec in specs.items():
            own = cast(nn.Linear, self.project[m])
            aligned = first.setdefault(spec.pooled_width, own)
            own.weight.data[:, -spec.pooled_width :] = aligned.weight.data[:, -spec.pooled_width :]
            own.weight.data[:, : -spec.pooled_width] *= COMPONENTS_START
            own.bias.data.copy_(aligned.bias.data)

    def forward(self, name: str, components: Tensor) -> Tensor:
        if self.training and self.dropout:
            components = dropped(components, self.dropout)
        h = self.project[name](components)
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)


class Keys(nn.Module):
    """Features (B, F) -> keys (B, P, width), linear, with learned positions."""

    def __init__(self, features: int, keys: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, keys * width)
        self.positions = nn.Parameter(torch.randn(keys, width) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features).unflatten(1, self.positions.shape) + self.positions


class Decoder(nn.Module):
    """Codes (B, U) -> components (B, K): a linear map plus a small MLP."""

    def __init__(self, units: int, components: int) -> None:
        super().__init__()
        self.linear = nn.Linear(units, components)
        self.mlp = nn.Sequential(nn.Linear(units, DECODER_WIDTH), nn.GELU(), nn.Linear(DECODER_WIDTH, components))

    def forward(self, code: Tensor) -> Tensor:
        return self.linear(code) + self.mlp(code)


class Critics(nn.Module):
    """Complementary codes (B, U) -> a guess of a shared code by each of C MLPs (B, C, V)."""

    def __init__(self, units: int, shared: int, count: int) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(
                nn.Linear(units, CRITIC_WIDTH), nn.GELU(), nn.Linear(CRITIC_WIDTH, CRITIC_WIDTH), nn.GELU(),
                nn.Linear(CRITIC_WIDTH, shared),
            )
            for _ in range(count)
        )  # fmt: skip

    def forward(self, code: Tensor) -> Tensor:
        return torch.stack([critic(code) for critic in self.critics], dim=1)


def quantise(x: Tensor, levels: int) -> Tensor:
    """Round tanh(x) to `levels` values in [-1, 1], an odd number; the gradient is that of tanh (straight-through)."""
    bounded, half = torch.tanh(x), (levels - 1) / 2
    return bounded + ((bounded * half).round() / half - bounded).detach()


class TVLStage2(RegisterModel):
    """Registers over frozen features. `forward` takes raw inputs or stored features (see RegisterModel).

    Args:
        stage1_model: the frozen encoders, or the shapes of their features if the model is used on stored features only.
        num_register_tokens: N.
        num_overlapping_tokens: No < N; the other registers are complementary.
        register_token_dim: D.
        nested_dropout_rate: drop probability of the last register (see tvl_align.registers.nested).
        preservation: build the decoders that the preservation term of the loss needs.
        share_weights: use the same blocks for every modality in complementary registers too.
        components, units, ...: see Stage2Config.
    Raises:
        UserError: N <= No, or block_width not divisible by the number of heads.
    """

    owned: Tensor  # (M, U), 1 for the overlapping units that belong to a modality, else 0

    def __init__(
        self,
        stage1_model: Stage1 | Mapping[str, FeatureSpec],
        num_register_tokens: int = DEFAULTS.num_register_tokens,
        num_overlapping_tokens: int = DEFAULTS.num_overlapping_tokens,
        register_token_dim: int = DEFAULTS.register_token_dim,
        num_cross_attn_layers: int = DEFAULTS.num_cross_attn_layers,
        num_heads: int = DEFAULTS.num_heads,
        mlp_ratio: float = DEFAULTS.mlp_ratio,
        drop_rate: float = DEFAULTS.drop_rate,
        attn_drop_rate: float = DEFAULTS.attn_drop_rate,
        drop_path_rate: float = DEFAULTS.drop_path_rate,
        nested_dropout_rate: float = DEFAULTS.nested_dropout_rate,
        nested_dropout_mode: NestedMode = DEFAULTS.nested_dropout_mode,
        preservation: bool = DEFAULTS.preservation_weight > 0,
        share_weights: bool = DEFAULTS.share_weights,
        **more: Any,
    ) -> None:
        knobs = Stage2Config(
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
            share_weights=share_weights,
            **more,
        )
        self.knobs = knobs
        super().__init__(
            stage1_model,
            knobs,
            share_weights=share_weights or "overlapping",
            separate_groups=True,
            causal=nested_dropout_mode == "nested",
            width=knobs.block_width,
        )
        self.codes = codes = Codes(self.specs, knobs)
        sizes, counts, width = codes.principal.sizes, codes.principal.counts, knobs.block_width
        start = START if knobs.linear else 1.0
        shared, unique = sum(codes.counts), sum(codes.comp_counts)
        self.trunk = Trunk(sizes, self.specs, knobs)
        self.shared_keys = Keys(knobs.trunk_width, knobs.num_keys, width)
        if not knobs.num_cross_attn_layers:  # unused parameters would stop training on several processes
            nn.ModuleList([self.readers, self.shared_keys]).requires_grad_(False)
        self.narrow = _narrow(codes.counts, width, start)
        self.linear = nn.Linear(knobs.trunk_width, shared) if knobs.linear else None
        owned = unit_owners(list(sizes), codes.counts, knobs.pair_units)
        self.register_buffer("owned", torch.tensor(owned, dtype=torch.float32), persistent=False)
        self.comp_narrow = nn.ModuleDict({m: _narrow(codes.comp_counts, width, start) for m in sizes})
        self.comp_linear = nn.ModuleDict({m: nn.Linear(k, unique) for m, k in sizes.items() if knobs.linear})
        self.decoders = nn.ModuleDict({m: Decoder(shared + unique, k) for m, k in counts.items() if preservation})
        has_critics = knobs.independence_weight > 0 and preservation
        self.critics = nn.ModuleDict({m: Critics(unique, shared, knobs.critics) for m in sizes if has_critics})
        wide = torch.randn(max(width, register_token_dim), min(width, register_token_dim))
        basis = torch.linalg.qr(wide)[0]
        self.register_buffer("widen", basis if width > register_token_dim else basis.T.contiguous())

    @classmethod
    def of(cls, knobs: Stage2Config, specs: Mapping[str, FeatureSpec]) -> "TVLStage2":
        """Build the model from the options of a run, with decoders if `preservation_weight` > 0."""
        return cls(specs, **model_options(knobs))

    def _make_readers(self, width: int) -> nn.ModuleDict:
        components = self.knobs.components
        sizes = {m: component_count(spec, components) + spec.pooled_width for m, spec in self.specs.items()}
        return nn.ModuleDict({m: Keys(k, self.knobs.num_keys, width) for m, k in sizes.items()})

    def inputs(self, name: str, modality: Tokens) -> tuple[Tensor, Tensor]:
        """Components and what the trunk makes of them as one token (B, 1, K + W), with noise in training, and its mask."""
        read = self.codes.noisy(self.codes.read(name, modality)[0])
        return torch.cat([read, self.trunk(name, read)], dim=1)[:, None], modality.present[:, None]

    def keys(self, name: str, tokens: Tensor) -> Tensor:
        """Keys (B, 2, P, width): overlapping registers attend to the trunk, complementary ones to the components."""
        read, h = self._parts(tokens)
        return torch.stack([self.shared_keys(h), self.readers[name](read)], dim=1)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A token (B, 1, K + W) -> components (B, K), trunk (B, W)."""
        return tokens[:, 0, : -self.knobs.trunk_width], tokens[:, 0, -self.knobs.trunk_width :]

    def condense(self, name: str, tokens: Tokens) -> Tensor:
        """Components of the tokens, (B, K + 1); see Stage2Model."""
        return self.codes.condense(name, tokens)

    def expand(self, z: Tensor) -> Tensor:
        """Registers (B, N, width of the blocks) -> (B, N, D)."""
        return z @ cast(Tensor, self.widen)

    def overlapping_units(self, name: str, attended: Tensor, trunk: Tensor) -> Tensor:
        """The units of the overlapping tokens of a modality: registers (B, No, width), trunk (B, W) -> (B, U)."""
        units = _units(self.narrow, attended)
        units = units + self.linear(trunk) if self.linear is not None else units
        return units * self.owned[list(self.specs).index(name)]

    def postprocess(
        self, over: dict[str, Tensor], comp: dict[str, Tensor], inputs: dict[str, Tensor], features: Features
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Attended registers and components -> tokens of narrow codes, and what the critics say of them."""
        shared, unique = {}, {}
        extras: dict[str, dict[str, Tensor]] = {"codes": {}, "guesses": {}, "answers": {}} if self.critics else {}
        for m in over:
            read, h = self._parts(inputs[m])
            units = self.overlapping_units(m, over[m], h)
            comp_units = _units(cast(nn.ModuleList, self.comp_narrow[m]), comp[m])
            if m in self.comp_linear:
                comp_units = comp_units + self.comp_linear[m](read)
            comp_units = quantise(comp_units, self.knobs.levels)
            shared[m], unique[m] = Codes.tokens(units, self.codes.over), Codes.tokens(comp_units, self.codes.comp)
            if m in self.critics:
                critics, code = self.critics[m], comp_units
                frozen = {name: p.detach() for name, p in critics.named_parameters()}
                extras["codes"][m] = units.detach()
                extras["guesses"][m] = critics(code.detach())
                extras["answers"][m] = functional_call(critics, frozen, code)
        if self.training and self.causal:
            extras["before_dropout"] = shared
        return shared, unique, extras

    def reconstruct(
        self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor, frozen: Tokens
    ) -> Reconstruction:
        """The error of the frozen tokens rebuilt from both codes: (B, 1), over the whole sequence.

        In training it is that of the components, whose mean variance is 1.
        """
        code = torch.cat([Codes.units(over.detach(), self.codes.over), Codes.units(comp, self.codes.comp)], dim=1)
        principal = self.codes.principal
        with torch.no_grad():
            read, rest = self.codes.read(name, frozen)
        if self.training:
            difference = read[:, : principal.counts[name]] - self.decoders[name](code)
            return Reconstruction(difference.square().mean(1, keepdim=True), mask)
        return Reconstruction(principal.squared_error(name, read, self.decoders[name](code), rest)[:, None], mask)

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the principal components, and start the linear projections to complementary codes at the closed form."""
        self.codes.principal.fit(batches)
        if not self.comp_linear:
            return
        scores = self.codes.paired_scores(batches)
        if len(next(iter(scores.values()))) < 2:
            log.warning(
                "fewer than 2 training rows have all of %s, so nothing shared is known at the start", ", ".join(scores)
            )
            return
        means = {m: x.mean(0) for m, x in scores.items()}
        centred = {m: x - means[m] for m, x in scores.items()}
        maps, _ = canonical(centred, sum(self.codes.counts))
        for m, x in centred.items():
            rest = residual_components(x, maps[m], sum(self.codes.comp_counts))
            linear = cast(nn.Linear, self.comp_linear[m])
            weight = torch.zeros_like(linear.weight)
            weight[: rest.shape[1]] = rest.T
            linear.weight.copy_(weight)
            linear.bias.copy_(-weight @ means[m])


def unit_owners(modalities: Sequence[str], counts: Sequence[int], pairs: bool) -> list[list[bool]]:
    """For each modality, whether each overlapping unit belongs to it: (M, U).

    counts: units of each token. pairs: units after the first token belong to pairs of modalities in turn, if there are three
    modalities or more; else every unit belongs to all.
    """
    subsets = list(combinations(modalities, 2)) if pairs and len(modalities) > 2 else [tuple(modalities)]
    rest = range(sum(counts[1:]))
    return [[True] * counts[0] + [m in subsets[i % len(subsets)] for i in rest] for m in modalities]


def _narrow(counts: Sequence[int], width: int, scale: float = 1.0) -> nn.ModuleList:
    """One linear layer per register, from its width to its units."""
    layers = nn.ModuleList(nn.Linear(width, units) for units in counts)
    for layer in layers:
        cast(nn.Linear, layer).weight.data *= scale
        cast(nn.Linear, layer).bias.data.zero_()
    return layers


def _units(layers: nn.ModuleList, z: Tensor) -> Tensor:
    """Attended registers (B, n, width) -> the units of all of them (B, U)."""
    return torch.cat([layer(x) for layer, x in zip(layers, z.unbind(1), strict=True)], dim=1)


class BaseLoss(RegisterLoss):
    """RegisterLoss + critic_loss + independence_weight * independence, where the model has critics."""

    def __init__(self, knobs: Stage2Config, modalities: Sequence[str] = MODALITIES) -> None:
        super().__init__(knobs, modalities)
        self.independence_weight = knobs.independence_weight
        self.nested_rate = knobs.nested_dropout_rate

    def align(self, output: Output) -> dict[str, Tensor]:
        """Alignment of the prefixes of the overlapping tokens, weighted by the probability that nested dropout keeps them.

        It reads the tokens before dropout. In evaluation, and with `independent` dropout, the alignment of the kept tokens.
        """
        if "before_dropout" not in output.extras:
            return super().align(output)
        tokens = output.extras["before_dropout"]
        registers = sum(group[next(iter(tokens))].shape[1] for group in (tokens, output.complementary_tokens))
        weights = prefix_probabilities(registers, self.nested_rate, next(iter(tokens.values())).shape[1])
        return prefix_alignment(tokens, output, self.pairs, weights.tolist())

    def terms(self, output: Output) -> dict[str, Tensor]:
        numbers = super().terms(output)
        if "guesses" not in output.extras:
            return numbers
        kept = output.nested_dropout_mask
        computed = {
            m: torch.ones_like(present) if kept is None else kept[:, output.overlapping_tokens[m].shape[1] :].any(1)
            for m, present in output.present.items()
        }
        codes, guesses, answers = (output.extras[name] for name in ("codes", "guesses", "answers"))
        critic, penalty = independence(
            codes, guesses, answers, computed, output.present, output.caption_keys, output.content_keys
        )
        total = numbers["total_loss"] + critic + self.independence_weight * penalty
        return numbers | {"critic_loss": critic, "independence": penalty, "total_loss": total}


class Stage2Loss(BaseLoss):
    """The loss of the base: takes a model's Output, or a mapping with its entries, and returns named scalars, among them
    `total_loss`. It has no parameters.

    `num_overlapping_tokens` is part of the documented signature and has no effect, because the Output holds its own number.
    Raises UserError if no pair of modalities is left to align.
    """

    def __init__(
        self,
        active_modalities: Sequence[str] = MODALITIES,
        num_overlapping_tokens: int = DEFAULTS.num_overlapping_tokens,
        complementary_reg_weight: float = DEFAULTS.complementary_reg_weight,
        preservation_weight: float = DEFAULTS.preservation_weight,
        disable_vision_text_loss: bool = DEFAULTS.disable_vision_text_loss,
        disable_tactile_text_loss: bool = DEFAULTS.disable_tactile_text_loss,
        independence_weight: float = DEFAULTS.independence_weight,
    ) -> None:
        knobs = Stage2Config(
            num_overlapping_tokens=num_overlapping_tokens,
            complementary_reg_weight=complementary_reg_weight,
            preservation_weight=preservation_weight,
            disable_vision_text_loss=disable_vision_text_loss,
            disable_tactile_text_loss=disable_tactile_text_loss,
            independence_weight=independence_weight,
        )
        super().__init__(knobs, active_modalities)


BASE = Method(Implementation("stage2_base", "5.0", "STAGE2"), Stage2Config, TVLStage2.of, BaseLoss)
