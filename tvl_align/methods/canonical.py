"""Linear projections that modalities share, found by canonical correlation analysis (CCA), and what they leave.

The directions in which whitened modalities correlate most have a closed form (Hotelling 1936; for more than two modalities
MAXVAR, Kettenring 1971). With many directions and few rows most correlations are over-fitted, so their strengths are
measured on held-out rows, and directions below MIN_CORRELATION are dropped.

Shapes: n rows that have every modality, K features of a modality, R variates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FOLDS = 3
RIDGE = 1e-2  # added to the variances before whitening, as a fraction of their mean
MIN_CORRELATION = 0.2  # on held-out rows
MAX_ROUNDING = 0.999  # correlations are taken to be at most this


def canonical(scores: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features {modality: (n, K)} of zero mean -> maps {modality: (K, R)} to variates of unit variance, strengths {(R,)}.

    The strength of a variate in a modality is its largest correlation with that of another modality, on held-out rows
    (3-fold), or 0 if that is below MIN_CORRELATION: what only two of three modalities share is noise in the third, where its
    map is zero. Variates are in descending order of their largest strength; R <= rank are kept, at least one.
    """
    rows, device = len(next(iter(scores.values()))), next(iter(scores.values())).device
    maps = _maxvar(scores, rank)
    fold = torch.arange(rows) * FOLDS // rows  # contiguous: rows of a group, such as frames of one press, stay together
    found = torch.zeros(len(scores), next(iter(maps.values())).shape[1])
    if rows >= 10 * FOLDS:
        found = torch.stack([_held_out(scores, fold == i, rank) for i in range(FOLDS)]).mean(0).amax(1)
    least = max(MIN_CORRELATION, 3 * (rows / FOLDS) ** -0.5)  # three standard errors of a correlation of 0
    order = found.amax(0).argsort(descending=True)
    count = int((found.amax(0) > least).sum())
    order = order[: max(1, count)]
    kept = found[:, order].clamp(max=MAX_ROUNDING).to(device)
    # where nothing is shared, the code is noise of whatever strength
    strengths = torch.where(kept > least, kept, 0.0) if count else kept.clamp(min=1e-3)
    of = dict(zip(scores, strengths, strict=True))
    return {m: w[:, order] * (of[m] > 0) for m, w in maps.items()}, of


def _held_out(scores: Mapping[str, Tensor], held: Tensor, rank: int) -> Tensor:
    """Correlations (M, M, R) between modalities on the held-out rows (n,) bool; 0 of a modality with itself."""
    maps = _maxvar({m: x[~held] for m, x in scores.items()}, rank)
    variates = torch.stack([scores[m][held] @ w for m, w in maps.items()])
    variates = (variates - variates.mean(1, keepdim=True)) / variates.std(1, keepdim=True).clamp(min=1e-6)
    found = torch.einsum("inr,jnr->ijr", variates, variates) / variates.shape[1]
    return found.cpu() * (1 - torch.eye(len(maps)))[..., None]


def _maxvar(scores: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """MAXVAR directions {modality: (K, R)}, most correlated first, scaled to variates of unit variance on these rows."""
    names = list(scores)
    white = {m: _whitening(x) for m, x in scores.items()}
    projected = [scores[m] @ white[m] for m in names]
    joined = torch.cat(projected, dim=1)
    between = joined.T @ joined / len(joined)
    sizes = [x.shape[1] for x in projected]
    for at in torch.arange(sum(sizes), device=between.device).split(sizes):
        between[at[:, None], at[None]] = 0
    vectors = torch.linalg.eigh(between.double())[1].flip(1)[:, : min(rank, *sizes)].to(between.dtype)
    maps = {}
    for m, x, part in zip(names, projected, vectors.split(sizes), strict=True):
        maps[m] = white[m] @ part / (x @ part).std(0).clamp(min=1e-6)
    return maps


def _whitening(x: Tensor) -> Tensor:
    """Ridge whitening (K, K) of rows (n, K) of zero mean."""
    covariance = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = values.clamp(min=0) + RIDGE * values.mean() + 1e-9
    return (vectors / scale.sqrt()).to(x.dtype)


def residual_components(scores: Tensor, code: Tensor, count: int, ridge: float = 1e-2) -> Tensor:
    """What a linear code leaves of the features -> map (K, count) from scores to its principal components, of unit variance.

    scores (n, K) of zero mean; code (K, U): map from scores to the code. What a ridge regression on the code predicts is
    removed from the scores, and components of the rest are read from the rest: read from the scores, they tell the code.
    """
    remove = torch.eye(len(code), device=code.device) - code @ ridge_regression(scores @ code, scores, ridge)
    rest = scores @ remove
    _, vectors = torch.linalg.eigh((rest.T @ rest / len(rest)).double())
    directions = remove @ vectors.flip(1)[:, :count].to(scores.dtype)
    return directions / (scores @ directions).std(0).clamp(min=1e-6)


def ridge_regression(x: Tensor, y: Tensor, ridge: float = 1e-2) -> Tensor:
    """Coefficients (F, G) of y (n, G) on x (n, F), both of zero mean; ridge: fraction of the mean variance of x."""
    inner = (x.T @ x).double()
    inner += (ridge * inner.diagonal().mean() + 1e-9) * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(inner, (x.T @ y).double()).to(x.dtype)
