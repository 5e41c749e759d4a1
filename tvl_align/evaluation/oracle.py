"""The retrieval oracle: how many partners are found by a method that knows every shared factor exactly, and nothing else.

It is a ceiling where the factors are all that two modalities share. Where they share more, such as the phase of a texture,
a method can be better.
"""

import math

import torch
from torch import Tensor


def compatible(first: Tensor, second: Tensor) -> Tensor:
    """(M, f) and (K, f) int64 levels of the shared factors; -1: not told -> (M, K) log-likelihood of a match, up to ties.

    A level that is told on both sides must be equal; each such match counts by how rare it is.
    """
    scores = torch.zeros(len(first), len(second))
    for a, b in zip(first.T, second.T, strict=True):
        told = (a >= 0)[:, None] & (b >= 0)[None]
        gain = math.log(max(2, int(torch.cat([a, b]).max()) + 1))
        scores += torch.where(told, torch.where(a[:, None] == b[None], gain, -torch.inf), 0.0)
    return scores


def expected_hits(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    """Probabilities (M,) that a positive is among the k best of scores (M, K), positives (M, K) bool; ties are broken at
    random."""
    best = torch.where(positive, scores, -torch.inf).amax(1, keepdim=True)
    tied = (scores - best).abs().nan_to_num(nan=0.0) < 1e-6  # -inf ties with -inf
    higher = ((scores > best) & ~tied).sum(1)
    negatives, count = (tied & ~positive).sum(1), tied.sum(1)
    hits = torch.zeros(len(scores))
    for i, (above, misses, n) in enumerate(zip(higher.tolist(), negatives.tolist(), count.tolist(), strict=True)):
        slots = min(k - above, n)
        if slots > 0:
            hits[i] = 1 - math.comb(misses, slots) / math.comb(n, slots)
    return hits


def expected_accuracy(scores: Tensor, positive: Tensor, k: int) -> float:
    """Expected Acc@k in percent, the mean of `expected_hits`; 0 of no rows."""
    return 100 * float(expected_hits(scores, positive, k).double().sum()) / max(1, len(scores))


def oracle(first: Tensor, second: Tensor, positive: Tensor) -> tuple[float, float]:
    """Expected Acc@1 and Acc@5 in percent, mean of both directions, of levels (M, f), (M, f) and positives (M, M) bool."""
    scores = compatible(first, second)
    both = [(scores, positive), (scores.T, positive.T)]
    acc1, acc5 = (sum(expected_accuracy(s, p, k) for s, p in both) / 2 for k in (1, 5))
    return acc1, acc5
