"""A register model that keeps shared and unique information apart: what wins the comparison of methods.

1. Overlapping and complementary registers are read by block stacks of their own and never see each other.
2. Overlapping tokens pass a narrow, noisy bottleneck, so that what the contrastive loss does not need finds no room.
3. Beside what registers learnt, each overlapping token carries linear read-outs of all frozen tokens that the other
   modalities answer (tvl_align.canonical), the strongest in the first token.
4. What slips through is taken out by regressions (tvl_align.separation).

3 and 4 are closed forms, fitted without labels on training rows: 3 once, 4 after every epoch. They act in evaluation only.
Complementary registers are read even where they are dropped: overlapping tokens are cleaned with their help.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

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
    """Weight of the L2 norm and diversity penalty on complementary tokens."""
    preservation_weight: float = 1.0
    """Weight of rebuilding the frozen tokens from all registers; 0: the documented formula exactly."""
    bottleneck: int = 24
    """Learnt units of an overlapping token: its rank, as far as registers go."""
    noise: float = 0.6
    """Standard deviation of the noise on learnt units (of unit variance) in training."""
    canonical: int = 60
    """Canonical variates of an overlapping token; 0: registers alone."""


class SeparatedModel(RegisterModel):
    """See the module's docstring. Overlapping tokens have width D and rank `bottleneck` + `canonical`, or as much of it as
    D over their number allows."""

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
        room = max(1, dim // count)
        self.learnt = min(knobs.bottleneck, room if not knobs.canonical else -(-room // 2))
        self.canonical_units = min(knobs.canonical, room - self.learnt)
        self.noise, self.names = knobs.noise, list(self.specs)
        narrow = {m: nn.ModuleList(nn.Linear(dim, self.learnt) for _ in range(count)) for m in self.specs}
        self.narrow = nn.ModuleDict(narrow)
        # Every overlapping token lives in directions of its own, so that the mean of a prefix gains with each of them.
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
        """In training noisy units and complementary tokens as they were read; in evaluation all units, both cleaned."""
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
        parts = [layer(over[:, i]) for i, layer in enumerate(self.narrow[modality])]
        return F.layer_norm(torch.stack(parts, dim=1), (self.learnt,))

    def _all_units(self, modality: str, units: Tensor, frozen: Tokens) -> Tensor:
        """(B, No, r) learnt units -> (B, No r + No c): with the canonical ones, as strong in the mean over rows."""
        flat = units.flatten(1)
        if self.projection is None:
            return flat
        tokens, mask = self._keys(frozen)
        return torch.cat([flat, self.projection(modality, tokens, mask) * flat.shape[1] ** 0.5], dim=1)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the closed forms on the given rows, of which those with every modality count. Fewer than two: none is fitted,
        and a warning says so."""
        if self.projection is not None and not self.projection.fitted:
            self.projection.fit(f.modalities for f in self._whole(batches()))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {m: [] for m in self.names}
        for features in self._whole(batches()):
            everyone = torch.ones(len(features), len(self.registers), dtype=torch.bool, device=self.registers.device)
            for m in self.names:
                tokens, mask = self._keys(features.modalities[m])
                z = self.attend([m], [self.readers[m](tokens)], [mask], everyone)
                units, comp = self._units(m, z[:, : self.num_overlapping]), z[:, self.num_overlapping :]
                found[m].append((self._all_units(m, units, features.modalities[m]), comp.flatten(1)))
        if sum(len(units) for units, _ in found[self.names[0]]) < 2:
            log.warning("no training rows have all of %s, so shared and unique are not taken apart", ", ".join(self.names))
            return
        units, comp = ({m: torch.cat([part[i] for part in parts]) for m, parts in found.items()} for i in (0, 1))
        fit_separations(dict(self.separations.items()), units, comp)

    def _whole(self, batches: Iterable[Features]) -> Iterator[Features]:
        """The rows that have every modality, of the batches that have such rows."""
        for features in map(Features.float, batches):
            if all(m in features.modalities for m in self.names):
                whole = torch.stack([features.modalities[m].present for m in self.names]).all(0)
                if whole.any():
                    yield features.map(lambda t, whole=whole: t[whole])

    def reconstruct(
        self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor
    ) -> Reconstruction:
        """In evaluation, what overlapping tokens tell of complementary ones is put back: the decoder learnt from both."""
        units = torch.einsum("bnd,nrd->bnr", over.detach(), self.basis[:, : self.learnt]).flatten(1)
        if not self.training:
            told = self.separations[name].predicted(-1, units).view_as(comp)
            comp = comp + told * kept[:, self.num_overlapping :, None]
        memory = torch.cat([units, comp.flatten(1)], dim=1)
        return reconstruction_error(self.decoders[name](memory, tokens.shape[1]), tokens, mask)


class LinearDecoder(nn.Module):
    """All registers of a row (B, F) -> tokens (B, T, W), through one narrow linear layer: what it needs must be plain."""

    def __init__(self, spec: FeatureSpec, size: int, width: int = 512) -> None:
        super().__init__()
        self.spec = spec
        self.map = nn.Sequential(nn.Linear(size, min(size, width)), nn.Linear(min(size, width), spec.tokens * spec.width))

    def forward(self, memory: Tensor, length: int) -> Tensor:
        narrow, wide = self.map
        size = length * self.spec.width  # sentences are short: tokens that no row has are not computed
        return F.linear(narrow(memory), wide.weight[:size], wide.bias[:size]).unflatten(1, (length, self.spec.width))
