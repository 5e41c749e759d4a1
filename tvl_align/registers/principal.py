"""What registers read of a modality: principal components (PCA) of the whole frozen token sequence, and the pooled feature.

A register that averages the positions it attends to loses where something is; a linear map of the whole sequence keeps it.
Components keep their own variances. Whitening them makes methods memorise: directions of small variance are mostly noise.
A sequence can be read in two grains: finely, for what only one modality shows, such as the order of words, and coarsely, for
what modalities share, which is learned from fewer numbers.

Shapes: B rows, T tokens of width W, P positions of width w after averaging and narrowing, F = P * w, K components, E width
of the pooled feature.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import Features, FeatureSpec, Tokens

MAX_POSITIONS = 17  # longer sequences are averaged over at most this many segments
GRAINS = 2  # fine segments in a coarse one
MAX_SIZE = 4096  # maximal P * w; wider tokens are first narrowed to the principal directions of a single token
POWER_STEPS = 6  # subspace iterations of the eigenvectors


def segment_length(spec: FeatureSpec, fine: bool = False) -> int:
    """Consecutive tokens that are averaged; fine: of half as long segments, if there are more than MAX_POSITIONS tokens."""
    return -(-spec.tokens // (MAX_POSITIONS * (GRAINS if fine else 1)))


def feature_shape(spec: FeatureSpec, fine: bool = False) -> tuple[int, int]:
    """Positions P and width w that the tokens of a modality are reduced to."""
    positions = -(-spec.tokens // segment_length(spec, fine))
    return positions, min(spec.width, MAX_SIZE // positions)


class PrincipalComponents(nn.Module):
    """Reads tokens (B, T, W) and pooled features (B, E) as K components, largest variance first, and E centred features.

    Both parts have a mean variance of 1 over the rows that were fitted. Before `fit` the components are random projections.
    fine: sequences are averaged over segments of half the length, see `coarsened`.
    """

    fitted: Tensor
    coarse: Tensor | None  # of each modality, from its components to those of longer segments

    def __init__(self, specs: Mapping[str, FeatureSpec], components: int, fine: bool = False) -> None:
        super().__init__()
        self.specs, self.shapes = dict(specs), {name: feature_shape(spec, fine) for name, spec in specs.items()}
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.segments = {name: segment_length(spec, fine) for name, spec in specs.items()}
        self.counts = {name: min(components, positions * width) for name, (positions, width) in self.shapes.items()}
        self.sizes = {name: self.counts[name] + spec.pooled_width for name, spec in specs.items()}
        for name, spec in specs.items():
            positions, width = self.shapes[name]
            narrow = torch.linalg.qr(torch.randn(spec.width, width))[0] if width < spec.width else torch.zeros(0)
            size = positions * width
            self.register_buffer(f"narrow_{name}", narrow)
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"vectors_{name}", torch.linalg.qr(torch.randn(size, self.counts[name]))[0])
            self.register_buffer(f"scale_{name}", torch.ones(2))  # of the components and of the pooled feature
            self.register_buffer(f"pooled_{name}", torch.zeros(spec.pooled_width))
        long = any(positions > MAX_POSITIONS for positions, _ in self.shapes.values())
        every = torch.eye(max(self.counts.values())).repeat(len(specs), 1, 1)
        self.register_buffer("coarse", every if long else None)  # (M, K, K)

    def flatten(self, name: str, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, W), (B, T) -> (B, F): normalised tokens, averaged over segments; segments without tokens are zero."""
        spec, narrow, segment = self.specs[name], self.get_buffer(f"narrow_{name}"), self.segments[name]
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        tokens = tokens @ narrow if narrow.numel() else tokens
        padding = -(-spec.tokens // segment) * segment - tokens.shape[1]
        weight = F.pad(mask, (0, padding))[..., None].to(tokens.dtype)
        padded = F.pad(tokens, (0, 0, 0, padding)) * weight
        if segment == 1:
            return padded.flatten(1)
        sums, counts = (x.unflatten(1, (-1, segment)).sum(2) for x in (padded, weight))
        return (sums / counts.clamp(min=1)).flatten(1)

    def forward(self, name: str, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What is read of B rows (B, K + E), and the mean squared part of the features outside the components (B,)."""
        centred = self.flatten(name, tokens.tokens, tokens.mask & tokens.present[:, None]) - self.get_buffer(f"mean_{name}")
        scores = centred @ self.get_buffer(f"vectors_{name}")
        rest = (centred.square().sum(1) - scores.square().sum(1)).clamp(min=0) / centred.shape[1]
        scale, pooled = self.get_buffer(f"scale_{name}"), tokens.pooled - self.get_buffer(f"pooled_{name}")
        return torch.cat([scores / scale[0], pooled / scale[1]], dim=1), rest

    def coarsened(self, read: Tensor) -> Tensor:
        """What is read of all modalities, finely (M, B, K + E), as if it had been read coarsely."""
        if self.coarse is None:
            return read
        count = self.coarse.shape[1]
        return torch.cat([read[..., :count] @ self.coarse, read[..., count:]], dim=2)

    def squared_error(self, name: str, read: Tensor, rebuilt: Tensor, rest: Tensor) -> Tensor:
        """Mean squared error (B,) of the features that components `rebuilt` (B, K) stand for; read, rest: see `forward`."""
        difference = (read[:, : self.counts[name]] - rebuilt) * self.get_buffer(f"scale_{name}")[0]
        return difference.square().sum(1) / self.get_buffer(f"mean_{name}").numel() + rest

    @torch.no_grad()
    def fit(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit on the rows that have each modality, in one pass, or two if tokens are narrowed."""
        wide = [name for name in self.specs if self.get_buffer(f"narrow_{name}").numel()]
        if wide:
            for name, (_, covariance, _) in _moments(batches(), wide, self._single_tokens).items():
                narrow = self.get_buffer(f"narrow_{name}")
                narrow.copy_(leading_eigenvectors(covariance, narrow.shape[1])[1])
        for name, (mean, covariance, count) in _moments(batches(), list(self.specs), self._features).items():
            size = len(self.get_buffer(f"mean_{name}"))
            kept = min(self.counts[name], count - 1)
            values, vectors = leading_eigenvectors(covariance[:size, :size], kept)
            self.get_buffer(f"mean_{name}").copy_(mean[:size])
            self.get_buffer(f"pooled_{name}").copy_(mean[size:])
            self.get_buffer(f"vectors_{name}").zero_()[:, :kept] = vectors
            if self.coarse is not None and self.shapes[name][0] > MAX_POSITIONS:
                coarse = self.coarse[list(self.specs).index(name)]
                coarse[: self.counts[name], : self.counts[name]] = 0
                coarse[:kept, :kept] = _coarse(vectors, values, self.shapes[name])
            variances = torch.stack([values.mean(), covariance.diagonal()[size:].mean()]).clamp(min=1e-12)
            self.get_buffer(f"scale_{name}").copy_(variances.sqrt())
        self.fitted.fill_(True)

    def _features(self, name: str, tokens: Tokens) -> Tensor:
        return torch.cat([self.flatten(name, tokens.tokens, tokens.mask), tokens.pooled], dim=1)

    @staticmethod
    def _single_tokens(name: str, tokens: Tokens) -> Tensor:
        return F.layer_norm(tokens.tokens, tokens.tokens.shape[-1:])[tokens.mask]


def _coarse(vectors: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Components (K,) of a fine sequence -> principal components of the same, averaged over coarse segments: (K, K).

    vectors (F, K) and values (K,): eigenvectors and eigenvalues of the fine sequence of shape (P, w). Both sides have
    the same mean variance.
    """
    fine = vectors.double().unflatten(0, shape).flatten(1).T[None]  # (1, w * K, P)
    coarse = F.avg_pool1d(fine, GRAINS, ceil_mode=True, count_include_pad=False)
    averaged = coarse.repeat_interleave(GRAINS, 2)[..., : shape[0]][0].T.unflatten(1, (shape[1], -1)).flatten(0, 1)  # (F, K)
    averaging = vectors.double().T @ averaged  # (K, K), symmetric: averaging is a projection
    variances, rotation = torch.linalg.eigh(averaging @ (values.double()[:, None] * averaging))
    scale = (values.double().mean() / variances.mean().clamp(min=1e-12)).sqrt()
    return (averaging @ rotation.flip(1) * scale).to(vectors.dtype)


def _moments(
    batches: Iterable[Features], names: list[str], features: Callable[[str, Tokens], Tensor]
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """{modality: (mean (F,), covariance (F, F), rows)} of the features of present rows, of modalities with two or more."""
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for batch in batches:
        for name, tokens in _present(batch, names):
            x = features(name, tokens.float())
            x = x[x.isfinite().all(1)]  # a row that is not finite is reported by the training step that meets it
            if name not in sums:
                sums[name] = [x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])]
            sums[name][0] += x.sum(0)
            sums[name][1].addmm_(x.T, x)
            counts[name] += len(x)
    return {
        name: (
            total / counts[name],
            moment.div_(counts[name]).addr_(total / counts[name], total / counts[name], alpha=-1),
            n,
        )
        for name, (total, moment) in sums.items()
        if (n := counts[name]) >= 2
    }


def _present(batch: Features, names: list[str]) -> Iterator[tuple[str, Tokens]]:
    for name in names:
        if name in batch.modalities and batch.modalities[name].present.any():
            tokens = batch.modalities[name]
            at = tokens.present
            yield name, tokens.map(lambda t, at=at: t[at])  # type: ignore[misc]


def leading_eigenvectors(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues (count,), in descending order, and eigenvectors (F, count) of a covariance (F, F).

    A large matrix is reduced by subspace iteration from a fixed random start, which takes a fraction of a full
    decomposition.
    """
    size = len(covariance)
    wide = min(size, count + 32)
    if 2 * wide >= size:
        jitter = 1e-7 * covariance.diagonal().mean() + 1e-12
        values, vectors = torch.linalg.eigh(covariance.double() + jitter * torch.eye(size).to(covariance).double())
        values, vectors = values.to(covariance.dtype), vectors.to(covariance.dtype)
    else:
        basis = torch.randn(size, wide, generator=torch.Generator().manual_seed(0)).to(covariance)
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(covariance @ basis)[0]
        values, inner = torch.linalg.eigh((basis.T @ covariance @ basis).double())
        values, vectors = values.to(covariance.dtype), basis @ inner.to(covariance.dtype)
    return values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
