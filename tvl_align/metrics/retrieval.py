"""Retrieval over the full gallery, both directions.

A tie counts against us: a candidate that scores as high as the best positive, up to rounding, is ranked before it, so
constant features never look good.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tvl_align.losses.contrastive import positive_mask

CHUNK = 256  # rows
TIE = 1e-6  # cosines that differ by less are equal: rounding decides between them
HIGHEST, LEAST_MASS = 70.0, 1e-20  # what exp of scores and sums of it may be in float32, with room for 10^7 of them
TVL_THRESHOLDS = (0.6356450319, 0.8591097295, 0.8927201033, 0.9208499491)


@dataclass(frozen=True)
class Retrieval:
    """Percentages over a whole gallery, the mean of both directions; `loss` is InfoNCE over the gallery."""

    acc1: float
    acc5: float
    chance1: float
    loss: float
    gallery: int


class _Direction:
    """What is known of the queries of one direction while scores come in: positives first, then the others. Tensors are
    (M,); a mass is the sum of exp(score - shift)."""

    def __init__(self, like: Tensor) -> None:
        self.best = like.new_full((len(like),), -torch.inf)  # score of the best positive
        self.positive_sum, self.positives, self.mass, self.behind = like.new_zeros(4, len(like))

    def take_positives(self, at: Tensor, scores: Tensor, positive: Tensor, shift: float, dim: int) -> None:
        self.best[at] = torch.maximum(self.best[at], torch.where(positive, scores, -torch.inf).amax(dim))
        self.positive_sum[at] += torch.where(positive, scores, 0.0).sum(dim)
        self.positives[at] += positive.sum(dim)
        self.mass[at] += torch.where(positive, (scores - shift).exp(), 0.0).sum(dim)

    def rank(self, at: slice, scores: Tensor, tie: float, spare: Tensor, dim: int) -> None:
        """Count what scores lower than the best positive; positives come as -inf, and NaN is not lower."""
        self.behind[at] += torch.lt(scores, (self.best[at] - tie).unsqueeze(dim), out=spare).sum(dim)

    def found(self, queries: Tensor, gallery: Tensor, shift: float, chunk: int) -> Tensor:
        """(3,) how many have a positive first, among the first 5, and the sum of their losses."""
        ahead = len(gallery) - self.behind
        log_mass = shift + self.mass.log()
        for rows in (~(self.mass > LEAST_MASS)).nonzero().squeeze(1).split(chunk):  # all score too low for this shift
            log_mass[rows] = (queries[rows] @ gallery.T).logsumexp(1)
        losses = log_mass - self.positive_sum / self.positives
        return torch.stack([(ahead < 1).sum(), (ahead < 5).sum(), losses.double().sum()])


def retrieval(
    x: Tensor, y: Tensor, valid: Tensor, keys: Tensor | None = None, scale: float = 100.0, chunk: int = 1024
) -> Retrieval:
    """Acc@1 and Acc@5 of x -> y and y -> x over the rows that have both.

    x, y (M, D) L2-normalised; valid (M,) bool. keys (M, K): rows that agree in any column are positives of each other
    (a pair with text); None: only the same row is. chance1 is the Acc@1 of a random ranking: the mean share of the
    gallery that is positive. scale: positive, as in the loss. A score is computed once and read in both directions; `chunk`
    x `chunk` of them are held at a time, few enough to stay in a cache.
    """
    x, y = scale * x[valid], y[valid]
    count = len(x)
    if count == 0:
        return Retrieval(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    ids = torch.arange(count, device=x.device)[:, None] if keys is None else keys[valid]
    ids = torch.stack([_first_alike(column) for column in ids.T], dim=1).unique(dim=1).int()  # columns that agree count once
    forth, back = _Direction(x), _Direction(y)
    shift = max(0.0, scale - HIGHEST)
    for rows, columns, scores, positive in _positive_scores(x, y, ids):
        forth.take_positives(rows, scores, positive, shift, 1)
        back.take_positives(columns, scores, positive, shift, 0)
    held = x.new_empty(2, min(chunk, count) ** 2)
    for start, first in product(range(0, count, chunk), range(0, count, chunk)):
        rows, columns = slice(start, min(start + chunk, count)), slice(first, min(first + chunk, count))
        size = rows.stop - rows.start, columns.stop - columns.start
        scores, spare = (block[: math.prod(size)].view(size) for block in held)
        torch.mm(x[rows], y[columns].T, out=scores)
        scores.masked_fill_(positive_mask(ids[rows], ids[columns]), -torch.inf)
        forth.rank(rows, scores, TIE * scale, spare, 1)
        back.rank(columns, scores, TIE * scale, spare, 0)
        weights = scores.sub_(shift).exp_()
        forth.mass[rows] += weights.sum(1)
        back.mass[columns] += weights.sum(0)
    found = forth.found(x, y, shift, chunk) + back.found(y, x, shift, chunk)
    hits1, hits5, loss = (found / 2 / count).tolist()
    return Retrieval(100 * hits1, 100 * hits5, 100 * forth.positives.mean().item() / count, loss, count)


def _first_alike(column: Tensor) -> Tensor:
    """(M,) keys -> (M,) the first row with the same key."""
    values, which = column.unique(return_inverse=True)
    rows = torch.arange(len(column), device=column.device)
    return rows.new_empty(len(values)).scatter_reduce(0, which, rows, "amin", include_self=False)[which]


def _positive_scores(x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks that together hold every pair of positives once: rows, columns, their scores and which are positives.

    In the order of a column of ids, the positives of CHUNK rows are neighbours: little more than CHUNK of them, unless many
    rows say the same.
    """
    for k in range(ids.shape[1]):
        order = ids[:, k].argsort()
        ordered = ids[order]
        end = torch.bincount(ids[:, k]).cumsum(0).tolist()
        of = ordered[:, k].tolist()
        for start in range(0, len(x), CHUNK):
            rows = slice(start, min(start + CHUNK, len(x)))
            columns = slice(end[of[start] - 1] if of[start] else 0, end[of[rows.stop - 1]])
            positive = positive_mask(ordered[rows, k : k + 1], ordered[columns, k : k + 1])
            if k:  # agreed in an earlier column: seen there
                positive &= ~positive_mask(ordered[rows, :k], ordered[columns, :k])
            yield order[rows], order[columns], x[order[rows]] @ y[order[columns]].T, positive


def tvl_protocol(x: Tensor, y: Tensor, text: Tensor, threshold: float, k: int, chunk: int = CHUNK) -> float:
    """Acc@k as TVL counts a pair with text (Fu et al. 2024): every row whose caption is similar enough is right.

    x, y (M, D) and the frozen text features (M, E), all L2-normalised; positives of i: all j with text_i . text_j above
    the threshold. Percent, the mean of rows and columns. Hubs are rewarded here: read it beside the other numbers.
    """
    hits = 0.0
    for queries, gallery in ((x, y), (y, x)):
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            nearest = (queries[part] @ gallery.T).topk(min(k, len(x)), dim=1).indices
            similar = text[part] @ text.T > threshold
            hits += similar.gather(1, nearest).any(1).sum().item() / 2
    return 100 * hits / max(len(x), 1)
