"""stage2_base v8.0. TVLStage2, the base model: register tokens that separate shared from unique information.

1. The frozen tokens of a modality are read as principal components, of long sequences in a fine and a coarse grain
   (tvl_align.registers.principal). Complementary registers read the fine one.
2. A trunk, a residual MLP with the same weights for all modalities, reads the coarse one through a linear projection per
   modality, and overlapping registers attend to what it makes of them; their stack is shared too. The projections read with
   dropout and start equal for what Stage 1 has aligned: in weights of its own a modality memorises what is unique to it.
3. Each token is a narrow code (tvl_align.methods.codes). Of three modalities, units of later overlapping tokens belong to
   pairs, for what the third lacks. Units are rounded, so that small traces of what is unique cannot hide in them. Prefixes
   are aligned with the probability that nested dropout keeps them: the expected loss instead of a sample, and no row is
   compared with shorter ones.
4. Complementary codes start at the principal components of what canonical correlations leave (tvl_align.methods.canonical),
   and have few discrete levels (finite scalar quantisation, Mentzer et al. 2023, arXiv:2309.15505). A decoder rebuilds the
   components from both codes; only the complementary ones get its gradients. Every row is rebuilt twice, from the registers
   that nested dropout keeps and from all: it drops the complementary register in half of the rows.
5. Predictors learn the complementary code of a modality from its overlapping one and the other way round, and the
   complementary code is trained so that they cannot (tvl_align.losses.independence).

Training and evaluation compute the same codes; only noise and dropout are absent in evaluation.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.func import functional_call

from tvl_align.contract import MODALITIES, Features, FeatureSpec, Implementation, Method, Output, Reconstruction, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.losses.alignment import prefix_alignment
from tvl_align.losses.complementary import log_error
from tvl_align.losses.independence import independence, moment_count, moments
from tvl_align.losses.register_loss import RegisterLoss, plain
from tvl_align.methods.canonical import canonical, residual_components
from tvl_align.methods.codes import CodeConfig, Codes, dropped
from tvl_align.registers.blocks import RegisterStack, attend_jointly
from tvl_align.registers.copies import Linears, Mlps
from tvl_align.registers.model import Encoded, NestedModel
from tvl_align.registers.nested import NestedMode, prefix_probabilities
from tvl_align.system.bounds import at_least, between
from tvl_align.system.console import UserError

log = logging.getLogger(__name__)
COMPONENTS_START = 0.3  # scale of the trunk's projections of components at the start, beside those of pooled features
PREDICTOR_WIDTH = 128
DECODER_WIDTH = 256
LEAST_ERROR = 0.01  # of a modality that counts, of a variance of 1


@dataclass(frozen=True)
class Stage2Config(CodeConfig):
    """The registers and their loss."""

    units: int = 32
    """Units of all overlapping tokens; the first token holds half of them, the others share the rest."""
    num_cross_attn_layers: int = 1
    """Number of cross-attention blocks between the registers and the keys; 0: registers attend to nothing (an ablation)."""
    preservation_weight: float = 1.0
    """Weight of the logarithm of the error of rebuilding the frozen tokens; 0: no decoders."""
    independence_weight: float = 0.07
    """Weight of what is predicted of complementary tokens from overlapping ones, or of these from them; 0: no predictors."""
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
    levels: int = 3
    """Levels of a unit of a complementary token, an odd number."""
    linear: bool = True
    """Add linear projections to what registers have attended to: of the trunk for overlapping codes, of the components, with
    a start at the closed form, for complementary ones."""
    pair_units: bool = True
    """With three modalities or more, units of all overlapping tokens but the first belong to pairs of modalities in turn:
    for what a third one lacks, where they are zero."""
    input_dropout: float = 0.2
    """Dropout probability of the components that the trunk reads."""
    resolution: float = 0.25
    """Round overlapping units to multiples of this, so that small traces of unique information cannot hide in them; those of
    the first token have a root mean square of 1. 0: not rounded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "block_width", "trunk_width", "num_keys")
        at_least(0, self, "trunk_layers", "independence_weight", "resolution")
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
    """Components (M, B, K) -> (M, B, W): a projection per modality, and residual MLPs that all modalities share.

    sizes: the components of each modality, the last E of them the pooled feature, then zeros. Where modalities agree in E,
    the projections of their pooled features start equal, so that features aligned by Stage 1 stay aligned.
    """

    def __init__(self, sizes: Sequence[int], specs: Mapping[str, FeatureSpec], knobs: Stage2Config) -> None:
        super().__init__()
        width = knobs.trunk_width
        self.project = _projections(sizes, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)) for _ in range(knobs.trunk_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = knobs.input_dropout
        weight, bias = self.project.weight.data, self.project.bias.data
        first: dict[int, tuple[int, slice]] = {}
        for i, (size, spec) in enumerate(zip(sizes, specs.values(), strict=True)):
            pooled = slice(size - spec.pooled_width, size)
            j, aligned = first.setdefault(spec.pooled_width, (i, pooled))
            weight[i, pooled] = weight[j, aligned]
            weight[i, : pooled.start] *= COMPONENTS_START
            bias[i] = bias[j]

    def forward(self, components: Tensor) -> Tensor:
        if self.training and self.dropout:
            components = dropped(components, self.dropout)
        h = self.project(components)
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)


def _projections(sizes: Sequence[int], outputs: int) -> Linears:
    """A linear map for each modality, from its components; those of a modality that has fewer are zero at the end."""
    layer = Linears(len(sizes), max(sizes), outputs)
    for i, size in enumerate(sizes):
        layer.weight.data[i, :size].uniform_(-(size**-0.5), size**-0.5)
        layer.weight.data[i, size:] = 0
        layer.bias.data[i].uniform_(-(size**-0.5), size**-0.5)
    return layer


class Keys(nn.Module):
    """Features (M, B, F) -> keys (M, B, P, width), linear, with learned positions. project: F -> P * width."""

    def __init__(self, project: Linears, keys: int) -> None:
        super().__init__()
        self.project = project
        copies, _, outputs = project.weight.shape
        self.positions = nn.Parameter(torch.randn(copies, keys, outputs // keys) * 0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.project(features).unflatten(2, self.positions.shape[1:]) + self.positions[:, None]


class Narrow(nn.Module):
    """Attended registers (M, B, n, width) -> the units of all of them (M, B, U), each unit from its own register."""

    owner: Tensor

    def __init__(self, copies: int, counts: Sequence[int], width: int) -> None:
        super().__init__()
        units = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        own = (units == torch.arange(len(counts))[:, None]).repeat_interleave(width, 0)  # (n * width, U)
        self.register_buffer("owner", own.float(), persistent=False)
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(copies, *own.shape).uniform_(-bound, bound) * own)
        self.bias = nn.Parameter(torch.zeros(copies, len(units)))

    def forward(self, attended: Tensor) -> Tensor:
        weight, z = self.weight * self.owner, attended.flatten(2)
        if len(weight) == 1:
            return F.linear(z, weight.squeeze(0).T, self.bias.squeeze(0))
        return torch.baddbmm(self.bias[:, None], z, weight)


class Decoders(nn.Module):
    """Codes (M, B, U) -> components (M, B, K): a linear map plus a small MLP."""

    def __init__(self, copies: int, units: int, components: int) -> None:
        super().__init__()
        self.linear, self.mlp = Linears(copies, units, components), Mlps(copies, units, DECODER_WIDTH, components)

    def forward(self, code: Tensor) -> Tensor:
        return self.linear(code) + self.mlp(code)


class Predictors(nn.Module):
    """Both codes of each modality -> (M, B, 3, P): moments of the complementary and units of the overlapping code; what an
    MLP predicts of each from the other; and the same again. The first predictions have gradients for the MLPs only, the
    second ones for the complementary code only."""

    def __init__(self, copies: int, units: int, comp_units: int) -> None:
        super().__init__()
        wide = PREDICTOR_WIDTH
        self.of_complementary, self.of_overlapping = (
            nn.Sequential(Linears(copies, inputs, wide), nn.GELU(), Mlps(copies, wide, wide, targets))
            for inputs, targets in ((units, moment_count(comp_units)), (comp_units, units))
        )

    def forward(self, code: Tensor, comp_code: Tensor) -> Tensor:
        """code (M, B, U), without gradient; comp_code (M, B, V)."""
        predicted, learnt = self.of_complementary(code), self.of_overlapping(comp_code.detach())
        judged = learnt
        if torch.is_grad_enabled():  # never while embedding, for functional_call is not safe in threads
            frozen = {name: p.detach() for name, p in self.of_overlapping.named_parameters()}
            judged = functional_call(self.of_overlapping, frozen, (comp_code,))
        every = [moments(comp_code), code, predicted, learnt, predicted.detach(), judged]
        return torch.cat(every, dim=2).unflatten(2, (3, -1))


class OnGrid(torch.autograd.Function):
    """x rounded to multiples of `step`, with the gradient of x (straight-through; Bengio et al. 2013, arXiv:1308.3432)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: float) -> Tensor:
        return (x / step).round() * step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def on_grid(x: Tensor, step: float) -> Tensor:
    """x rounded to multiples of `step`, with the gradient of x. NaN and inf stay, so that they show."""
    return cast(Tensor, OnGrid.apply(x, step))


def quantise(x: Tensor, levels: int) -> Tensor:
    """Round tanh(x) to `levels` values in [-1, 1], an odd number; the gradient is that of tanh (straight-through)."""
    return on_grid(torch.tanh(x.float()), 1 / (levels // 2))


def rounded(units: Tensor, first: int, step: float) -> Tensor:
    """Units (..., U) of tokens -> multiples of `step`; the gradient is that of what is rounded (straight-through).

    Rows are scaled first, so that the `first` units, those of the token that is never dropped, have a root mean square of 1:
    the scale of a row would be a number of any precision. It has a gradient although cosines do not depend on it: without,
    rounding gives the gradient a part along the units, and TacTip lost 3 of 66% of its partners.
    """
    size = torch.linalg.vector_norm(units[..., :first].float(), dim=-1, keepdim=True) * first**-0.5
    return on_grid(units / size.clamp(min=1e-6), step)


@dataclass(frozen=True)
class Read:
    """What `TVLStage2.encode` has computed.

    components (M, B, K) without noise, the part of the features outside them (M, B), present (M, B), keys (M, B, P, width)
    of the trunk and of the components, and units of both codes, (M, B, U) and (M, B, V).
    """

    components: Tensor
    rest: Tensor
    present: Tensor
    shared_keys: Tensor
    keys: Tensor
    units: Tensor
    comp_units: Tensor


class TVLStage2(NestedModel):
    """Registers over frozen features. `forward` takes raw inputs or stored features (see NestedModel).

    All modalities are computed at once, in the order of `specs`: shapes below have a dimension M for them. A modality that a
    batch lacks counts as absent in all rows.

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
    rebuilt: Tensor  # (M, K), share of each component in the error of a modality

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
        super().__init__(stage1_model, knobs, causal=nested_dropout_mode == "nested")
        options, layers, width = knobs.block(knobs.block_width), knobs.num_cross_attn_layers, knobs.block_width
        self.codes = codes = Codes(self.specs, knobs, fine=True)
        sizes, counts, names = list(codes.principal.sizes.values()), list(codes.principal.counts.values()), list(self.specs)
        own = len(names)
        shared, unique, leading = sum(codes.counts), sum(codes.comp_counts), self.num_overlapping
        self.query = nn.Linear(register_token_dim, width)
        self.trunk = Trunk(sizes, self.specs, knobs)
        self.shared_keys = Keys(Linears(1, knobs.trunk_width, knobs.num_keys * width), knobs.num_keys)
        self.readers = Keys(_projections(sizes, knobs.num_keys * width), knobs.num_keys)
        if not layers:  # unused parameters would stop training on several processes
            nn.ModuleList([self.readers, self.shared_keys]).requires_grad_(False)
        self.shared_stack = RegisterStack(options, layers, leading, self.causal)
        rest = num_register_tokens - leading
        self.own_stack = RegisterStack(options, layers, rest, self.causal, copies=1 if share_weights else own)
        self.narrow = Narrow(1, codes.counts, width)
        self.linear = nn.Linear(knobs.trunk_width, shared) if knobs.linear else None
        owned = unit_owners(names, codes.counts, knobs.pair_units)
        self.register_buffer("owned", torch.tensor(owned, dtype=torch.float32), persistent=False)
        self.comp_narrow = Narrow(own, codes.comp_counts, width)
        self.comp_linear = _projections(sizes, unique) if knobs.linear else None
        self.decoders = Decoders(own, shared + unique, max(counts)) if preservation else None
        weight = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]) / torch.tensor(counts)[:, None]
        self.register_buffer("rebuilt", weight, persistent=False)
        predicts = knobs.independence_weight > 0 and preservation
        self.predictors = Predictors(own, shared, unique) if predicts else None
        wide = torch.randn(max(width, register_token_dim), min(width, register_token_dim))
        basis = torch.linalg.qr(wide)[0]
        self.register_buffer("widen", basis if width > register_token_dim else basis.T.contiguous())

    @classmethod
    def of(cls, knobs: Stage2Config, specs: Mapping[str, FeatureSpec]) -> "TVLStage2":
        """Build the model from the options of a run, with decoders if `preservation_weight` > 0."""
        return cls(specs, **model_options(knobs))

    def condense(self, name: str, tokens: Tokens) -> Tensor:
        """Components of the tokens, (B, K + 1); see Stage2Model."""
        return self.codes.condense(name, tokens)

    def encode(self, features: Features, kept: Tensor | None) -> Encoded:
        """Components -> codes of every modality, as tokens, and what the predictors say of them."""
        leading, queries = self.num_overlapping, self.query(self.registers)
        read, rest, present = self.codes.read_all(features)
        noisy = self.codes.noisy(read)
        h = self.trunk(self.codes.principal.coarsened(noisy))
        shared_keys, keys, rows = self.shared_keys(h), self.readers(noisy), present[..., None]
        first, last = (None, None) if kept is None else (kept[:, :leading], kept[:, leading:])
        units = self.narrow(self.shared_stack(queries[:leading], shared_keys, rows, first))
        units = (units + self.linear(h) if self.linear is not None else units) * self.owned[:, None]
        if self.knobs.resolution:
            units = rounded(units, self.codes.counts[0], self.knobs.resolution)
        comp_units = self.comp_narrow(self.own_stack(queries[leading:], keys, rows, last))
        comp_units = quantise(
            comp_units + self.comp_linear(noisy) if self.comp_linear is not None else comp_units, self.knobs.levels
        )
        names = list(self.specs)
        extras: dict[str, dict[str, Tensor]] = {}
        if self.predictors is not None:
            predictions = self.predictors(units.detach(), comp_units)
            extras["predictions"] = dict(zip(names, predictions.unbind(0), strict=True))
        if self.training and self.causal:
            prefixes = units[:, :, None] * self.codes.prefixes
            extras["prefixes"] = dict(zip(names, prefixes.unbind(0), strict=True))
        extras = {kind: {m: x for m, x in found.items() if m in features.modalities} for kind, found in extras.items()}
        tokens = Codes.tokens(units, self.codes.over), Codes.tokens(comp_units, self.codes.comp)
        return Encoded(names, *tokens, Read(read, rest, present, shared_keys, keys, units, comp_units), extras)

    def joint(self, encoded: Encoded, kept: Tensor, features: Features) -> Tensor:
        read, leading, queries = encoded.inputs, self.num_overlapping, self.query(self.registers)
        rows = [read.present[..., None]]
        parts = [
            attend_jointly([self.shared_stack], queries[:leading], [read.shared_keys], rows, kept[:, :leading]),
            attend_jointly([self.own_stack], queries[leading:], [read.keys], rows, kept[:, leading:]),
        ]
        return torch.cat(parts, dim=1) @ cast(Tensor, self.widen)

    def reconstruct(
        self, encoded: Encoded, over: Tensor, comp: Tensor, kept: Tensor, features: Features
    ) -> dict[str, Reconstruction]:
        """The error of the frozen tokens rebuilt from both codes: (B, 1), over the whole sequence.

        In training it is that of the components, whose mean variance is 1: (B, 2), from the kept registers and from all, or
        (B, 1) with `independent` dropout, where the others have not seen the dropped ones.
        """
        if self.decoders is None:
            return {}
        read, names = encoded.inputs, list(self.specs)
        code = torch.cat([read.units.detach(), read.comp_units], dim=2)
        kept_code = code * self.codes.kept_units(kept)
        if self.training:
            each = torch.stack([kept_code, code] if self.causal else [kept_code], dim=1)  # (M, S, B, U + V)
            rebuilt = self.decoders(each.flatten(1, 2)).float().unflatten(1, each.shape[1:3])
            components = read.components[:, None, :, : rebuilt.shape[3]].expand_as(rebuilt)
            squares = F.mse_loss(rebuilt, components, reduction="none")
            errors = (squares * self.rebuilt[:, None, None]).sum(3).transpose(1, 2)
        else:
            principal, rebuilt = self.codes.principal, self.decoders(kept_code).float()
            of = zip(names, read.components, rebuilt, read.rest, strict=True)
            errors = torch.stack(
                [principal.squared_error(m, x[:, : principal.sizes[m]], r[:, : principal.counts[m]], e) for m, x, r, e in of]
            )[..., None]
        present = read.present[..., None].expand_as(errors)
        return {m: Reconstruction(*parts) for m, *parts in zip(names, errors.unbind(0), present.unbind(0), strict=True)}

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the principal components, and start the linear projections to complementary codes at the closed form."""
        self.codes.principal.fit(batches)
        self.start_complementary(batches)

    @torch.no_grad()
    def start_complementary(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Start the linear projections to complementary codes at the closed form; the principal components are fitted."""
        if self.comp_linear is None:
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
        for i, (m, x) in enumerate(centred.items()):
            rest = residual_components(x, maps[m], sum(self.codes.comp_counts))
            weight = torch.zeros_like(self.comp_linear.weight[i])
            weight[: len(rest), : rest.shape[1]] = rest
            self.comp_linear.weight[i] = weight
            self.comp_linear.bias[i] = -means[m] @ weight[: len(rest)]


def unit_owners(modalities: Sequence[str], counts: Sequence[int], pairs: bool) -> list[list[bool]]:
    """For each modality, whether each overlapping unit belongs to it: (M, U).

    counts: units of each token. pairs: units after the first token belong to pairs of modalities in turn, if there are three
    modalities or more; else every unit belongs to all.
    """
    subsets = list(combinations(modalities, 2)) if pairs and len(modalities) > 2 else [tuple(modalities)]
    rest = range(sum(counts[1:]))
    return [[True] * counts[0] + [m in subsets[i % len(subsets)] for i in rest] for m in modalities]


class BaseLoss(RegisterLoss):
    """RegisterLoss + prediction + independence_weight * independence, where the model has predictors."""

    def __init__(self, knobs: Stage2Config, modalities: Sequence[str] = MODALITIES) -> None:
        super().__init__(knobs, modalities)
        self.independence_weight = knobs.independence_weight
        self.nested_rate = knobs.nested_dropout_rate

    def align(self, output: Output) -> dict[str, Tensor]:
        """Alignment of the prefixes of the overlapping tokens, weighted by the probability that nested dropout keeps them.

        It reads the tokens before dropout. In evaluation, and with `independent` dropout, the alignment of the kept tokens.
        """
        if "prefixes" not in output.extras:
            return super().align(output)
        prefixes = output.extras["prefixes"]
        registers = sum(group[next(iter(prefixes))].shape[1] for group in (prefixes, output.complementary_tokens))
        weights = prefix_probabilities(registers, self.nested_rate, next(iter(prefixes.values())).shape[1])
        return prefix_alignment(prefixes, output, self.pairs, weights)

    def preserve(self, errors: Tensor) -> Tensor:
        """The mean logarithm of the errors, so that a modality which is hard to rebuild counts no more than another."""
        return log_error(errors, LEAST_ERROR).mean()

    def terms(self, output: Output) -> dict[str, Tensor]:
        numbers = super().terms(output)
        if "predictions" not in output.extras:
            return numbers
        computed, kept = output.present, output.nested_dropout_mask
        if kept is not None and "prefixes" not in output.extras:  # dropped registers have not been computed
            computed = {m: rows & kept.all(1) for m, rows in computed.items()}
        computed = {m: plain(rows, output, m) for m, rows in computed.items()}
        prediction, penalty = independence(output.extras["predictions"], computed)
        total = (numbers["total_loss"] + prediction).add(penalty, alpha=self.independence_weight)
        return numbers | {"prediction": prediction, "independence": penalty, "total_loss": total}


class Stage2Loss(BaseLoss):
    """The loss of the base: takes a model's Output, or a mapping with its entries, and returns named scalars, among them
    `total_loss`. It has no parameters.

    `num_overlapping_tokens` is part of the documented signature and has no effect, because the Output holds its own number.
    nested_dropout_rate: that of the model; prefixes count as often as it keeps them.
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
        nested_dropout_rate: float = DEFAULTS.nested_dropout_rate,
    ) -> None:
        knobs = Stage2Config(
            num_overlapping_tokens=num_overlapping_tokens,
            complementary_reg_weight=complementary_reg_weight,
            preservation_weight=preservation_weight,
            disable_vision_text_loss=disable_vision_text_loss,
            disable_tactile_text_loss=disable_tactile_text_loss,
            independence_weight=independence_weight,
            nested_dropout_rate=nested_dropout_rate,
        )
        super().__init__(knobs, active_modalities)


BASE = Method(Implementation("stage2_base", "8.0", "STAGE2"), Stage2Config, TVLStage2.of, BaseLoss, recordable=True)
