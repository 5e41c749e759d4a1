"""Linear read-outs of all frozen tokens at once, chosen by what the other modalities answer: canonical correlations.

A register averages the positions it attends to; where something lies, and how its parts differ, is lost on the way. A linear
map of the whole sequence keeps it, and which maps are shared is a closed form: the directions in which whitened modalities
correlate most (Hotelling 1936; for more than two modalities MAXVAR, Kettenring 1971). No labels, no gradient; frozen
features do not change, so one fit per run is enough.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.system.console import progress
from tvl_align.system.distributed import is_main

POSITIONS = 17  # longer sequences are averaged over so many stretches
SIZE = 4096  # at most so many numbers per row: wider tokens pass a random projection first
COMPONENTS = 2048  # principal components that may correlate
RIDGE = 3e-3  # of the mean variance, added before whitening
ROUNDING = 1e-6  # variance of normalised tokens below which they count as constant, so that rounding is not amplified


class CanonicalProjection(nn.Module):
    """{modality: tokens (B, T, W)} -> {modality: (B, R)}: R canonical variates, the strongest first. Zero until fitted.

    A variate is weighted with its squared correlation, and all of them together are scaled to mean squared norm 1.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], rank: int) -> None:
        super().__init__()
        self.rank, self.names = rank, list(specs)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        for name, spec in specs.items():
            positions = -(-spec.tokens // -(-spec.tokens // POSITIONS))
            width = min(spec.width, SIZE // positions)
            narrow = torch.linalg.qr(torch.randn(spec.width, width))[0] if width < spec.width else torch.zeros(0)
            self.register_buffer(f"narrow_{name}", narrow)
            self.register_buffer(f"mean_{name}", torch.zeros(positions * width))
            self.register_buffer(f"map_{name}", torch.zeros(positions * width, rank))

    def forward(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        return (self.flat(name, tokens, mask) - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"map_{name}")

    def flat(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, W), (B, T) -> (B, P * w): normalised tokens, averaged over stretches, absent ones zero."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        narrow, size = self.get_buffer(f"narrow_{name}"), self.get_buffer(f"mean_{name}").numel()
        tokens = tokens @ narrow if narrow.numel() else tokens
        positions = size // tokens.shape[-1]
        stretch = -(-tokens.shape[1] // positions)
        missing = positions * stretch - tokens.shape[1]
        weight = F.pad(mask, (0, missing))[..., None].to(tokens.dtype).unflatten(1, (positions, stretch))
        sums = (F.pad(tokens, (0, 0, 0, missing)).unflatten(1, (positions, stretch)) * weight).sum(2)
        return (sums / weight.sum(2).clamp(min=1)).flatten(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Mapping[str, Tokens]]) -> None:
        """From rows that have every modality. Fewer than two rows: nothing is fitted."""
        count, sums, moments = 0, None, None
        for batch in batches:
            flat = {m: self.flat(m, batch[m].tokens, batch[m].mask) for m in self.names}
            joined = torch.cat(list(flat.values()), dim=1)
            if moments is None:
                sizes = [x.shape[1] for x in flat.values()]
                sums, moments = joined.new_zeros(joined.shape[1]), joined.new_zeros(joined.shape[1], joined.shape[1])
            count += len(joined)
            sums += joined.sum(0)
            moments.addmm_(joined.T, joined)
        if count < 2:
            return
        mean = sums / count
        covariance = moments.div_(count).addr_(mean, mean, alpha=-1)
        parts = dict(zip(self.names, torch.arange(sum(sizes), device=mean.device).split(sizes), strict=True))
        parts = {m: slice(int(at[0]), int(at[-1]) + 1) for m, at in parts.items()}
        with progress(len(parts) + 1, "canonical read-outs", "decomposition", quiet=not is_main()) as bar:
            white = {}
            for m, at in parts.items():
                white[m] = _whitening(covariance[at, at], count - 1)
                bar.update()
            maps, strength = _maxvar(white, covariance, parts, self.rank)
            bar.update()
        for m, map_ in maps.items():
            own = covariance[parts[m], parts[m]]
            weighted = map_ * strength.clamp(max=1).square()
            power = torch.einsum("fr,fg,gr->", weighted, own, weighted).clamp(min=ROUNDING)
            self.get_buffer(f"mean_{m}").copy_(mean[parts[m]])
            self.get_buffer(f"map_{m}").zero_()[:, : weighted.shape[1]] = weighted / power.sqrt()
        self.fitted.fill_(True)


def _whitening(covariance: Tensor, rank: int) -> Tensor:
    """(F, F) of the given rank at most -> (F, K): leading principal directions, each over its standard deviation, small
    ones held back."""
    size = len(covariance)
    kept = min(COMPONENTS, rank, size)
    if rank < size // 2:  # few rows: the range of the covariance, found by a random sketch, is exact and much cheaper
        sketch = torch.randn(size, rank, generator=torch.Generator().manual_seed(0)).to(covariance)
        span = torch.linalg.qr(covariance @ sketch)[0]
        values, vectors = torch.linalg.eigh(span.T @ covariance @ span)
        vectors = span @ vectors
    else:
        values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:kept].clamp(min=0), vectors.flip(1)[:, :kept]
    return vectors / (values + RIDGE * covariance.diagonal().mean() + ROUNDING).sqrt()


def _maxvar(
    white: Mapping[str, Tensor], covariance: Tensor, parts: Mapping[str, slice], rank: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Directions in which whitened modalities agree: {modality: (F, R)} and (R,) strengths, falling.

    The strength is an eigenvalue of the correlations between modalities: for two of them the canonical correlation.
    """
    sizes = [w.shape[1] for w in white.values()]
    between = covariance.new_zeros(sum(sizes), sum(sizes))
    at = dict(zip(white, torch.arange(sum(sizes), device=covariance.device).split(sizes), strict=True))
    for a, w_a in white.items():
        for b, w_b in white.items():
            if a != b:
                between[at[a][:, None], at[b][None]] = w_a.T @ covariance[parts[a], parts[b]] @ w_b
    values, vectors = torch.linalg.eigh(between)
    kept = min(rank, int((values > 0).sum()))
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    return {m: w @ vectors[at[m]] for m, w in white.items()}, values
