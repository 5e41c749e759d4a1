"""Linear projections of the whole frozen token sequence, found by canonical correlation analysis (CCA).

A register averages the positions it attends to, which loses where something is and how positions differ. A linear map of
the whole sequence keeps this. The maps that modalities share have a closed form: the directions in which the whitened
modalities correlate most (CCA, Hotelling 1936; for more than two modalities MAXVAR, Kettenring 1971). The fit needs neither
labels nor gradients. Frozen features do not change, so one fit per run is enough.

Shapes: B rows, T tokens of width W, P positions of width w after averaging and narrowing, F = P * w, R variates.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.system.console import progress
from tvl_align.system.distributed import is_main

MAX_POSITIONS = 17  # longer sequences are averaged over at most this many segments
MAX_SIZE = 4096  # maximal P * w; wider tokens first pass a random projection
MAX_COMPONENTS = 2048  # principal components per modality that enter the CCA
RIDGE = 3e-3  # added before whitening, as a fraction of the mean variance
ROUNDING = 1e-6  # added before whitening, so that rounding errors of constant tokens are not amplified


class CanonicalProjection(nn.Module):
    """Projects tokens (B, T, W) to R canonical variates (B, R), sorted by correlation. The result is zero until `fit`.

    Each variate is weighted by its squared correlation. The weighted variates together have a mean squared norm of 1.
    """

    fitted: Tensor

    def __init__(self, specs: Mapping[str, FeatureSpec], rank: int) -> None:
        super().__init__()
        self.rank, self.names = rank, list(specs)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        for name, spec in specs.items():
            positions = -(-spec.tokens // -(-spec.tokens // MAX_POSITIONS))
            width = min(spec.width, MAX_SIZE // positions)
            narrow = torch.linalg.qr(torch.randn(spec.width, width))[0] if width < spec.width else torch.zeros(0)
            self.register_buffer(f"narrow_{name}", narrow)
            self.register_buffer(f"mean_{name}", torch.zeros(positions * width))
            self.register_buffer(f"map_{name}", torch.zeros(positions * width, rank))

    def forward(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, T, W) of the modality `name`, mask (B, T) bool -> (B, R)."""
        return (self.flatten(name, tokens, mask) - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"map_{name}")

    def flatten(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, W), (B, T) -> (B, P * w): normalised tokens, averaged over segments; segments without tokens are zero."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        narrow, size = self.get_buffer(f"narrow_{name}"), self.get_buffer(f"mean_{name}").numel()
        tokens = tokens @ narrow if narrow.numel() else tokens
        positions = size // tokens.shape[-1]
        segment = -(-tokens.shape[1] // positions)
        padding = positions * segment - tokens.shape[1]
        weight = F.pad(mask, (0, padding))[..., None].to(tokens.dtype).unflatten(1, (positions, segment))
        sums = (F.pad(tokens, (0, 0, 0, padding)).unflatten(1, (positions, segment)) * weight).sum(2)
        return (sums / weight.sum(2).clamp(min=1)).flatten(1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Mapping[str, Tokens]]) -> None:
        """Fit on batches of rows that have every modality. With fewer than two rows nothing is fitted."""
        count, sizes = 0, [self.get_buffer(f"mean_{m}").numel() for m in self.names]
        sums, moments = torch.zeros(0), torch.zeros(0)
        for batch in batches:
            joined = torch.cat([self.flatten(m, batch[m].tokens, batch[m].mask) for m in self.names], dim=1)
            if count == 0:
                sums, moments = joined.new_zeros(joined.shape[1]), joined.new_zeros(joined.shape[1], joined.shape[1])
            count += len(joined)
            sums += joined.sum(0)
            moments.addmm_(joined.T, joined)
        if count < 2:
            return
        mean = sums / count
        covariance = moments.div_(count).addr_(mean, mean, alpha=-1)
        indices = zip(self.names, torch.arange(sum(sizes), device=mean.device).split(sizes), strict=True)
        parts = {m: slice(int(at[0]), int(at[-1]) + 1) for m, at in indices}
        with progress(len(parts) + 1, "canonical correlations", "decomposition", quiet=not is_main()) as bar:
            white = {}
            for m, at in parts.items():
                white[m] = _whitening(covariance[at, at], count - 1)
                bar.update()
            maps, correlations = _maxvar(white, covariance, parts, self.rank)
            bar.update()
        for m, map_ in maps.items():
            own = covariance[parts[m], parts[m]]
            weighted = map_ * correlations.clamp(max=1).square()
            power = torch.einsum("fr,fg,gr->", weighted, own, weighted).clamp(min=ROUNDING)
            self.get_buffer(f"mean_{m}").copy_(mean[parts[m]])
            self.get_buffer(f"map_{m}").zero_()[:, : weighted.shape[1]] = weighted / power.sqrt()
        self.fitted.fill_(True)


def _whitening(covariance: Tensor, rank: int) -> Tensor:
    """Regularised PCA whitening of a covariance (F, F) of at most the given rank -> (F, K), largest variance first."""
    size = len(covariance)
    kept = min(MAX_COMPONENTS, rank, size)
    if rank < size // 2:  # few rows: a random sketch spans the range of the covariance exactly and is much cheaper
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
    """MAXVAR directions {modality: (F, R)} and their correlations (R,), in descending order.

    A correlation is an eigenvalue of the between-modality correlation matrix. For two modalities it is the canonical
    correlation.
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
