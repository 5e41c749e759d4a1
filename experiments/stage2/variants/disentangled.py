"""stage2_disentangled v1. Shared and unique information kept apart: separate stacks, a bottleneck, closed-form erasure.

Three mechanisms, each with its reason:

1. Overlapping and complementary registers are read by block stacks of their own and never see each other.
2. Overlapping tokens pass a narrow, noisy bottleneck, so that what the contrastive loss does not need finds no room. After
   it each modality keeps only the directions in which the others answer: canonical correlations above a threshold
   (Hotelling 1936). What only one modality knows has none.
3. From complementary tokens everything predictable from the overlapping ones is subtracted, by least squares on the units
   and on random features of them (after concept erasure, Belrose et al. 2023, arXiv:2306.03819); preservation then
   rebuilds the frozen tokens from both, so complementary tokens hold what is left.

2 and 3 are closed forms on running covariances of the tokens: no labels, and no gradient through the covariances.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.config import RegisterConfig
from tvl_align.contract import Features, FeatureSpec, Reconstruction
from tvl_align.register_model import RegisterModel
from tvl_align.registers import token_target
from tvl_align.runtime import joint_noise, mean_count

MOMENTUM = 0.98  # of the running covariances, per step
REFRESH = 20  # steps between two solutions of the closed forms
RIDGE = 1e-3  # relative: added to, or smallest eigenvalue of, a covariance before it is inverted


@dataclass(frozen=True)
class DisentangledConfig(RegisterConfig):
    """The registers and their loss."""

    num_register_tokens: int = 6
    """Registers in all."""
    complementary_reg_weight: float = 0.0
    """Weight of the L2 norm and diversity penalty on complementary tokens."""
    preservation_weight: float = 1.0
    """Weight of rebuilding the frozen tokens from all registers."""
    bottleneck: int = 24
    """Rank of an overlapping token (at most the register width over the number of overlapping tokens)."""
    noise: float = 0.6
    """Standard deviation of the noise on bottleneck units (of unit variance) in training."""
    threshold: float = 0.8
    """Canonical correlation (on training rows, where it is flattered) below which a direction of the overlapping tokens
    counts as unique and is removed."""


class Disentangled(RegisterModel):
    """See the module's docstring. Overlapping tokens have width D and rank `bottleneck`."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: DisentangledConfig) -> None:
        super().__init__(specs, knobs, separate_groups=True, causal=True, preservation=knobs.preservation_weight > 0)
        width, dim, count = knobs.bottleneck, knobs.register_token_dim, knobs.num_overlapping_tokens
        width = min(width, dim // count)
        self.noise, self.threshold, self.names = knobs.noise, knobs.threshold, list(specs)
        self.narrow = nn.ModuleDict({m: nn.ModuleList(nn.Linear(dim, width) for _ in range(count)) for m in specs})
        # Every overlapping token lives in directions of its own, so that the mean of a prefix gains with each of them.
        basis = torch.linalg.qr(torch.randn(dim, count * width))[0].T
        self.register_buffer("basis", basis.reshape(count, width, dim).contiguous())
        comp = (knobs.num_register_tokens - count) * dim
        self.between = nn.ModuleList(Moments(len(specs) * width) for _ in range(count))
        self.erasers = nn.ModuleDict({m: Eraser(count * width, comp) for m in specs})
        self.register_buffer("project", torch.eye(width).repeat(len(specs), count, 1, 1))
        if self.decoders:
            self.decoders = nn.ModuleDict({m: LinearDecoder(spec, count * width + comp) for m, spec in specs.items()})

    def settle(self, over: dict[str, Tensor], comp: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        units = {m: self._units(m, over[m]) for m in self.names if m in over}
        learn = self.training and len(units) == len(self.names)
        if learn:
            self._observe(units)
        shared, unique = {}, {}
        for m, narrow in units.items():
            kept = torch.einsum("bnr,nsr->bns", narrow, self.project[self.names.index(m)])
            unique[m] = self.erasers[m](kept.flatten(1).detach(), comp[m].flatten(1), learn).view_as(comp[m])
            noisy = narrow + self.noise * joint_noise(narrow) if self.training and self.noise else narrow
            shared[m] = torch.einsum("bnr,nrd->bnd", noisy if self.training else kept, self.basis)
        return shared, unique

    def _units(self, modality: str, over: Tensor) -> Tensor:
        parts = [layer(over[:, i]) for i, layer in enumerate(self.narrow[modality])]
        return F.layer_norm(torch.stack(parts, dim=1), self.basis.shape[1:2])

    @torch.no_grad()
    def _observe(self, units: dict[str, Tensor]) -> None:
        """Take a batch into the running moments; every REFRESH steps solve for the projections anew."""
        for i, moments in enumerate(self.between):
            moments.update(torch.cat([units[m][:, i] for m in self.names], dim=1))
        if int(self.between[0].steps) % REFRESH == 0:
            self.solve()

    def solve(self) -> None:
        width = self.basis.shape[1]
        for at in range(len(self.names)):
            own = torch.zeros(len(self.names) * width, dtype=torch.bool, device=self.basis.device)
            own[at * width : (at + 1) * width] = True
            for i, moments in enumerate(self.between):
                self.project[at, i] = shared_projection(moments.covariance, own, self.threshold)

    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the closed forms exactly, on all given rows at once: first the projections, then the erasure that needs them.

        While training they follow running moments over augmented views and weights that still move.
        """
        for moments in self.between:
            moments.restart()
        for features in batches():
            units = {m: u for m, (u, _) in self._raw(features).items()}
            for i, moments in enumerate(self.between):
                moments.add(torch.cat([units[m][:, i] for m in self.names], dim=1))
        self.solve()
        for eraser in self.erasers.values():
            eraser.moments.restart()
        for features in batches():
            for at, (m, (units, comp)) in enumerate(self._raw(features).items()):
                kept = torch.einsum("bnr,nsr->bns", units, self.project[at]).flatten(1)
                self.erasers[m].moments.add(torch.cat([self.erasers[m].features(kept), comp.flatten(1)], dim=1))
        for eraser in self.erasers.values():
            eraser.solve()

    def _raw(self, features: Features) -> dict[str, tuple[Tensor, Tensor]]:
        """Units and complementary tokens before any closed form, of the rows that have every modality."""
        features = features.float()
        whole = torch.stack([features.modalities[m].present for m in self.names]).all(0)
        everyone = torch.ones(int(whole.sum()), len(self.registers), dtype=torch.bool, device=whole.device)
        found = {}
        for m in self.names:
            tokens, mask = self._keys(features.modalities[m].map(lambda t: t[whole]))
            z = self.read([m], [self.readers[m](tokens)], [mask], everyone)
            found[m] = self._units(m, z[:, : self.num_overlapping]), z[:, self.num_overlapping :]
        return found

    def rebuild(self, name: str, over: Tensor, comp: Tensor, kept: Tensor, tokens: Tensor, mask: Tensor) -> Reconstruction:
        memory = torch.einsum("bnd,nrd->bnr", over.detach(), self.basis).flatten(1)
        memory = torch.cat([memory, comp.flatten(1)], dim=1)
        return Reconstruction(self.decoders[name](memory, tokens.shape[1]), token_target(tokens), mask)


def shared_projection(covariance: Tensor, own: Tensor, threshold: float) -> Tensor:
    """(r, r) projection of one modality's units on the directions in which the others answer.

    covariance (M, M) of all modalities' units; own (M,) bool: which are this modality's. In coordinates where own and
    other units are white, the singular values of their covariance are the canonical correlations; those below the
    threshold are cut.
    """
    mine, other, cross = covariance[own][:, own], covariance[~own][:, ~own], covariance[own][:, ~own]
    white, back = _roots(mine)
    u, correlation, _ = torch.linalg.svd(white @ cross @ _roots(other)[0], full_matrices=False)
    kept = u[:, correlation > threshold]
    return back @ kept @ kept.T @ white


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse square root and square root of a covariance, small eigenvalues raised."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=RIDGE * float(values.max()) + 1e-6)
    return (vectors / values.sqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T


class Moments(nn.Module):
    """Running mean and covariance of (B, F) vectors over all processes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("second", torch.zeros(size, size))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        self.steps += 1
        rate = max(1 - MOMENTUM, 1 / float(self.steps))
        x = x.float()
        self.mean.lerp_(mean_count(x.mean(0)), rate)
        self.second.lerp_(mean_count(x.T @ x / len(x)), rate)

    def restart(self) -> None:
        """Forget everything; `add` then takes plain means over all rows."""
        self.steps.zero_()
        self.mean.zero_()
        self.second.zero_()

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take rows into plain means; `steps` counts rows."""
        self.steps += len(x)
        rate = len(x) / float(self.steps.clamp(min=1))
        x = x.float()
        if len(x):
            self.mean.lerp_(x.mean(0), rate)
            self.second.lerp_(x.T @ x / len(x), rate)

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean[:, None] * self.mean[None]


class Eraser(nn.Module):
    """Subtracts from complementary tokens (B, C) their least-squares prediction from overlapping units (B, O).

    The prediction is linear in the units and in random tanh features of them (Rahimi & Recht 2007): a class that is a
    non-linear function of the units is linear in those, and what is uncorrelated with them no linear probe can read.
    """

    def __init__(self, over: int, comp: int, features: int = 256) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(features, over) * 1.5 / over**0.5)
        self.register_buffer("bias", torch.randn(features))
        self.moments = Moments(over + features + comp)
        self.register_buffer("map", torch.zeros(comp, over + features))
        self.register_buffer("offset", torch.zeros(over + features))

    def forward(self, units: Tensor, comp: Tensor, learn: bool) -> Tensor:
        seen = self.features(units)
        if learn:
            self.moments.update(torch.cat([seen, comp], dim=1))
            if int(self.moments.steps) % REFRESH == 0:
                self.solve()
        return comp - (seen - self.offset) @ self.map.T

    def features(self, units: Tensor) -> Tensor:
        """(B, O) units -> (B, O + F): the units and their random features."""
        return torch.cat([units, torch.tanh(units @ self.weight.T + self.bias)], dim=1)

    @torch.no_grad()
    def solve(self) -> None:
        size = self.map.shape[1]
        covariance = self.moments.covariance.double()
        inner = covariance[:size, :size]
        inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(size, dtype=inner.dtype, device=inner.device)
        self.map.copy_(torch.linalg.solve(inner, covariance[:size, size:]).T)
        self.offset.copy_(self.moments.mean[:size])


class LinearDecoder(nn.Module):
    """All registers of a row (B, F) -> tokens (B, T, W), through one narrow linear layer: what it needs must be plain."""

    def __init__(self, spec: FeatureSpec, size: int, width: int = 512) -> None:
        super().__init__()
        self.spec = spec
        self.map = nn.Sequential(nn.Linear(size, min(size, width)), nn.Linear(min(size, width), spec.tokens * spec.width))

    def forward(self, memory: Tensor, length: int) -> Tensor:
        return self.map(memory).unflatten(1, (self.spec.tokens, self.spec.width))[:, :length]
