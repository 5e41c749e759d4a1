"""SeparatedModel: registers with separated shared and unique information. The base method and an ablation of it use it.

1. Overlapping and complementary registers have separate block stacks and do not attend to each other.
2. Overlapping tokens pass a narrow bottleneck with noise, so they hold little that the contrastive loss does not need.
3. Besides the learnt units, each overlapping token contains canonical variates: linear projections of all frozen tokens
   found by canonical correlation analysis (tvl_align.methods.canonical). The first token has those with the highest
   correlation.
4. Two regressions remove unique information from overlapping tokens and shared information from complementary ones
   (tvl_align.methods.separation).

Steps 3 and 4 are closed forms, fitted on training rows without labels: step 3 once, step 4 after every epoch. They are used
in evaluation only. The complementary tokens are computed even where nested dropout drops them, because step 4 needs them to
clean the overlapping tokens.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import Features, FeatureSpec, Reconstruction, Tokens
from tvl_align.encoders.tvl import Stage1
from tvl_align.methods.canonical import CanonicalProjection
from tvl_align.methods.separation import Separation, fit_separations
from tvl_align.registers.decoder import reconstruction_error
from tvl_align.registers.model import RegisterConfig, RegisterModel
from tvl_align.system.distributed import joint_noise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeparatedConfig(RegisterConfig):
    """The registers and their loss."""

    complementary_reg_weight: float = 0.01
    """Weight of the L2-norm and diversity penalties on complementary tokens."""
    preservation_weight: float = 1.0
    """Weight of the error of reconstructing the frozen tokens from all registers; 0: exactly the documented loss."""
    bottleneck: int = 24
    """Learnt units per overlapping token, i.e. the rank of its learnt part."""
    noise: float = 0.6
    """Standard deviation of the Gaussian noise added to the learnt units (of unit variance) in training."""
    canonical: int = 60
    """Canonical variates per overlapping token; 0: no canonical projections."""


class SeparatedModel(RegisterModel):
    """RegisterModel with the four steps above.

    Overlapping tokens have width D and rank `bottleneck` + `canonical`, reduced if necessary to D // No.
    """

    basis: Tensor

    def __init__(
        self, stage1: Stage1 | Mapping[str, FeatureSpec], knobs: SeparatedConfig, *, share_weights: bool = False
    ) -> None:
        super().__init__(
            stage1,
            knobs,
            share_weights=share_weights,
            separate_groups=True,
            causal=knobs.nested_dropout_mode == "nested",
            preservation=knobs.preservation_weight > 0,
        )
        dim, count = knobs.register_token_dim, knobs.num_overlapping_tokens
        max_rank = max(1, dim // count)
        self.learnt = min(knobs.bottleneck, max_rank if not knobs.canonical else -(-max_rank // 2))
        self.canonical_units = min(knobs.canonical, max_rank - self.learnt)
        self.noise, self.names = knobs.noise, list(self.specs)
        narrow = {m: nn.ModuleList(nn.Linear(dim, self.learnt) for _ in range(count)) for m in self.specs}
        self.narrow = nn.ModuleDict(narrow)
        # The overlapping tokens span orthogonal subspaces, so every further token adds information to the pooled mean.
        rank = self.learnt + self.canonical_units
        basis = torch.linalg.qr(torch.randn(dim, count * rank))[0].T
        self.register_buffer("basis", basis.reshape(count, rank, dim).contiguous())
        comp = (knobs.num_register_tokens - count) * dim
        inner = count * self.learnt
        self.separations = nn.ModuleDict({m: Separation(inner, count * self.canonical_units, comp) for m in self.specs})
        self.projection = CanonicalProjection(self.specs, count * self.canonical_units) if self.canonical_units else None
        if self.decoders:
            self.decoders = nn.ModuleDict({m: LinearDecoder(spec, inner + comp) for m, spec in self.specs.items()})

    def postprocess(
        self, over: dict[str, Tensor], comp: dict[str, Tensor], features: Features
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Map overlapping tokens through the bottleneck; shapes do not change.

        Training: noise on the learnt units, complementary tokens unchanged. Evaluation: learnt and canonical units, with
        both groups cleaned by the regressions.
        """
        shared, unique = {}, {}
        for m in over:
            units, unique[m] = self._units(m, over[m]), comp[m]
            if self.training:
                units = units + self.noise * joint_noise(units)
                shared[m] = torch.einsum("bnr,nrd->bnd", units, self.basis[:, : self.learnt])
            else:
                cleaned, rest = self.separations[m](self._all_units(m, units, features.modalities[m]), comp[m].flatten(1))
                inner, further = cleaned.split([units[0].numel(), cleaned.shape[1] - units[0].numel()], dim=1)
                units = torch.cat([inner.view_as(units), further.unflatten(1, (units.shape[1], -1))], dim=2)
                shared[m], unique[m] = torch.einsum("bnr,nrd->bnd", units, self.basis), rest.view_as(comp[m])
        return shared, unique

    def _units(self, modality: str, over: Tensor) -> Tensor:
        """Overlapping tokens (B, No, D) -> learnt units (B, No, r), normalised to zero mean and unit variance."""
        layers = cast(nn.ModuleList, self.narrow[modality])
        parts = [layer(over[:, i]) for i, layer in enumerate(layers)]
        return F.layer_norm(torch.stack(parts, dim=1), (self.learnt,))

    def _all_units(self, modality: str, units: Tensor, frozen: Tokens) -> Tensor:
        """Learnt units (B, No, r) -> (B, No r + No c): learnt and canonical units, of equal mean squared norm."""
        flat = units.flatten(1)
        if self.projection is None:
            return flat
        tokens, mask = self._keys(frozen)
        return torch.cat([flat, self.projection(modality, tokens, mask) * flat.shape[1] ** 0.5], dim=1)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the closed forms on the rows that have every modality.

        With fewer than two such rows nothing is fitted and a warning is logged.
        """
        if self.projection is not None and not self.projection.fitted:
            self.projection.fit(f.modalities for f in self._complete_rows(batches()))
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {m: [] for m in self.names}
        for features in self._complete_rows(batches()):
            kept = torch.ones(len(features), len(self.registers), dtype=torch.bool, device=self.registers.device)
            for m in self.names:
                tokens, mask = self._keys(features.modalities[m])
                z = self.attend([m], [self.readers[m](tokens)], [mask], kept)
                learnt, complementary = self._units(m, z[:, : self.num_overlapping]), z[:, self.num_overlapping :]
                parts[m].append((self._all_units(m, learnt, features.modalities[m]), complementary.flatten(1)))
        if sum(len(units) for units, _ in parts[self.names[0]]) < 2:
            names = ", ".join(self.names)
            log.warning("fewer than 2 training rows have all of %s, so shared and unique are not separated", names)
            return
        units = {m: torch.cat([units for units, _ in batch]) for m, batch in parts.items()}
        comp = {m: torch.cat([comp for _, comp in batch]) for m, batch in parts.items()}
        fit_separations({m: self._separation(m) for m in self.names}, units, comp)

    def _separation(self, modality: str) -> Separation:
        return cast(Separation, self.separations[modality])

    def _complete_rows(self, batches: Iterable[Features]) -> Iterator[Features]:
        """The rows that have every modality; batches without such rows are skipped."""
        for features in map(Features.float, batches):
            if all(m in features.modalities for m in self.names):
                complete = torch.stack([features.modalities[m].present for m in self.names]).all(0)
                if complete.any():
                    yield features.map(itemgetter(complete))

    def reconstruct(
        self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor
    ) -> Reconstruction:
        """Reconstruct the frozen tokens of a modality from the learnt units and the complementary tokens.

        In evaluation the shared part that was subtracted from the complementary tokens is added again, because the decoder
        was trained with it.
        """
        units = torch.einsum("bnd,nrd->bnr", over.detach(), self.basis[:, : self.learnt]).flatten(1)
        if not self.training:
            shared = self._separation(name).predicted(-1, units).view_as(comp)
            comp = comp + shared * kept[:, self.num_overlapping :, None]
        memory = torch.cat([units, comp.flatten(1)], dim=1)
        return reconstruction_error(self.decoders[name](memory, tokens.shape[1]), tokens, mask)


class LinearDecoder(nn.Module):
    """Reconstructs tokens (B, T, W) from all registers of a row, flattened to (B, F), with two linear layers.

    The decoder is linear and its hidden width is at most `width`, so the registers must hold the information in a linearly
    decodable form.
    """

    def __init__(self, spec: FeatureSpec, size: int, width: int = 512) -> None:
        super().__init__()
        self.spec = spec
        self.map = nn.Sequential(nn.Linear(size, min(size, width)), nn.Linear(min(size, width), spec.tokens * spec.width))

    def forward(self, memory: Tensor, length: int) -> Tensor:
        """(B, F) -> the first `length` tokens (B, length, W)."""
        narrow, wide = cast(list[nn.Linear], self.map)
        size = length * self.spec.width  # only the first `length` tokens are computed
        return F.linear(narrow(memory), wide.weight[:size], wide.bias[:size]).unflatten(1, (length, self.spec.width))
