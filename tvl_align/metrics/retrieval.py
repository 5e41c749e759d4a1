"""Retrieval accuracy over a full split, in both directions.

Ties are ranked pessimistically: a negative with the same score as the best positive, up to rounding, is ranked first.
Constant features therefore score 0.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from tvl_align.losses.contrastive import positive_mask

CHUNK = 256  # rows per step
TIE = 1e-6  # cosine similarities that differ by less count as equal
MAX_EXPONENT = 70.0  # float32: a sum of 10^7 terms exp(70) does not overflow
MIN_EXP_SUM = 1e-20  # below this a sum of exp() has lost precision and is computed again
TVL_THRESHOLDS = (0.6356450319, 0.8591097295, 0.8927201033, 0.9208499491)


@dataclass(frozen=True)
class Retrieval:
    """Retrieval results, averaged over both directions.

    acc1, acc5, chance1: percent. loss: InfoNCE with all rows as candidates. gallery: number of rows. hits (gallery,): the
    mean of both directions of a row's hit at 1, for intervals.
    """

    acc1: float
    acc5: float
    chance1: float
    loss: float
    gallery: int
    hits: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)


class _Direction:
    """Running statistics of the queries of one direction, each (M,). Positives are added first, then the negatives.

    exp_sum is the sum of exp(score - shift); ranked_lower counts candidates that score below the best positive.
    """

    def __init__(self, like: Tensor) -> None:
        self.best = like.new_full((len(like),), -torch.inf)  # score of the best positive
        self.positive_sum, self.positives, self.exp_sum, self.ranked_lower = like.new_zeros(4, len(like))

    def add_positives(self, at: Tensor, scores: Tensor, positive: Tensor, shift: float, dim: int) -> None:
        self.best[at] = torch.maximum(self.best[at], torch.where(positive, scores, -torch.inf).amax(dim))
        self.positive_sum[at] += torch.where(positive, scores, 0.0).sum(dim)
        self.positives[at] += positive.sum(dim)
        self.exp_sum[at] += torch.where(positive, (scores - shift).exp(), 0.0).sum(dim)

    def count_lower(self, at: slice, scores: Tensor, tie: float, buffer: Tensor, dim: int) -> None:
        """Count candidates that score below the best positive. Positives must be -inf; NaN is not counted."""
        self.ranked_lower[at] += torch.lt(scores, (self.best[at] - tie).unsqueeze(dim), out=buffer).sum(dim)

    def per_query(self, queries: Tensor, gallery: Tensor, shift: float, chunk: int) -> Tensor:
        """(M, 3) float64: hit at 1, hit at 5 and loss of every query."""
        ranked_higher = len(gallery) - self.ranked_lower
        log_sum = shift + self.exp_sum.log()
        for rows in (~(self.exp_sum > MIN_EXP_SUM)).nonzero().squeeze(1).split(chunk):  # underflow, or NaN
            log_sum[rows] = (queries[rows] @ gallery.T).logsumexp(1)
        losses = log_sum - self.positive_sum / self.positives
        return torch.stack([ranked_higher < 1, ranked_higher < 5, losses], dim=1).double()


def retrieval(
    x: Tensor, y: Tensor, valid: Tensor, keys: Tensor | None = None, scale: float = 100.0, chunk: int = 1024
) -> Retrieval:
    """Retrieval over the full split: mean Acc@1 and Acc@5 of x -> y and y -> x.

    x, y (M, D), L2-normalised; valid (M,) bool: rows that have both modalities. keys (M, K) int64: rows with the same key in
    any column are positives of each other (`keys_of` the pair); None: only the same row is a positive. scale > 0: the logit
    scale of the loss. chance1 is the Acc@1 of a random ranking, i.e. the mean fraction of candidates that are positives.
    Every score is computed once, in blocks of `chunk` x `chunk`, and used for both directions. No valid row gives NaN.
    """
    x, y = scale * x[valid], y[valid]
    count = len(x)
    if count == 0:
        return Retrieval(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    ids = torch.arange(count, device=x.device)[:, None] if keys is None else keys[valid]
    ids = torch.stack([_first_row_with_same_key(column) for column in ids.T], dim=1)
    ids = ids.unique(dim=1).int()  # equal columns count once
    x_to_y, y_to_x = _Direction(x), _Direction(y)
    shift = max(0.0, scale - MAX_EXPONENT)
    for row_ids, column_ids, scores, positive in _positive_scores(x, y, ids):
        x_to_y.add_positives(row_ids, scores, positive, shift, 1)
        y_to_x.add_positives(column_ids, scores, positive, shift, 0)
    buffers = x.new_empty(2, min(chunk, count) ** 2)
    for start, first in product(range(0, count, chunk), range(0, count, chunk)):
        rows, columns = slice(start, min(start + chunk, count)), slice(first, min(first + chunk, count))
        size = rows.stop - rows.start, columns.stop - columns.start
        scores, buffer = (b[: math.prod(size)].view(size) for b in buffers)
        torch.mm(x[rows], y[columns].T, out=scores)
        scores.masked_fill_(positive_mask(ids[rows], ids[columns]), -torch.inf)
        x_to_y.count_lower(rows, scores, TIE * scale, buffer, 1)
        y_to_x.count_lower(columns, scores, TIE * scale, buffer, 0)
        weights = scores.sub_(shift).exp_()
        x_to_y.exp_sum[rows] += weights.sum(1)
        y_to_x.exp_sum[columns] += weights.sum(0)
    per_row = (x_to_y.per_query(x, y, shift, chunk) + y_to_x.per_query(y, x, shift, chunk)) / 2
    hits1, hits5, loss = per_row.mean(0).tolist()
    chance = 100 * x_to_y.positives.mean().item() / count
    return Retrieval(100 * hits1, 100 * hits5, chance, loss, count, per_row[:, 0].float().cpu())


def _first_row_with_same_key(column: Tensor) -> Tensor:
    """(M,) keys -> (M,) index of the first row with the same key."""
    values, which = column.unique(return_inverse=True)
    rows = torch.arange(len(column), device=column.device)
    return rows.new_empty(len(values)).scatter_reduce(0, which, rows, "amin", include_self=False)[which]


def _positive_scores(x: Tensor, y: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield blocks that together contain every positive pair once: row indices, column indices, scores, positive mask.

    Rows are sorted by one column of ids, so the positives of CHUNK rows are contiguous. A block therefore has little more
    than CHUNK columns, unless many rows share a key.
    """
    for k in range(ids.shape[1]):
        order = ids[:, k].argsort()
        ordered = ids[order]
        end = torch.bincount(ids[:, k]).cumsum(0).tolist()
        sorted_ids = ordered[:, k].tolist()
        for start in range(0, len(x), CHUNK):
            rows = slice(start, min(start + CHUNK, len(x)))
            columns = slice(end[sorted_ids[start] - 1] if sorted_ids[start] else 0, end[sorted_ids[rows.stop - 1]])
            positive = positive_mask(ordered[rows, k : k + 1], ordered[columns, k : k + 1])
            if k:  # pairs that match in an earlier column were already yielded
                positive &= ~positive_mask(ordered[rows, :k], ordered[columns, :k])
            yield order[rows], order[columns], x[order[rows]] @ y[order[columns]].T, positive


def tvl_protocol(x: Tensor, y: Tensor, text: Tensor, threshold: float, k: int, chunk: int = CHUNK) -> float:
    """Acc@k of a pair with text under TVL's protocol (Fu et al. 2024, arXiv:2402.13232): percent, mean of both directions.

    x, y (M, D) and the frozen text features text (M, E), all L2-normalised. Row j is a positive of row i if the cosine
    similarity of their text features is above `threshold`. This rewards hubs, i.e. rows that are similar to many captions.
    """
    hits = 0.0
    for queries, gallery in ((x, y), (y, x)):
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            nearest = (queries[part] @ gallery.T).topk(min(k, len(x)), dim=1).indices
            similar = text[part] @ text.T > threshold
            hits += similar.gather(1, nearest).any(1).sum().item() / 2
    return 100 * hits / max(len(x), 1)
