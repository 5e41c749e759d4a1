"""Slow, obvious twins of the fast code: loops over rows, nothing shared with what they check."""

import math

import numpy as np


def info_nce(x: np.ndarray, y: np.ndarray, scale: float, positives: np.ndarray, valid: np.ndarray) -> float:
    """Sum over valid rows of the mean over positives of -log softmax, one row and one column at a time."""
    total = 0.0
    for i in range(len(x)):
        if not valid[i]:
            continue
        weights = {j: math.exp(scale * float(x[i] @ y[j])) for j in range(len(y)) if valid[j]}
        good = [j for j in weights if positives[i][j]]
        total += sum(-math.log(weights[j] / sum(weights.values())) for j in good) / len(good)
    return total


def positives(pair: tuple[str, str], captions: np.ndarray, contents: dict[str, np.ndarray]) -> np.ndarray:
    """(N, N) bool: the same row, the same sentence in a pair with text, or the same content in a modality of the pair."""
    good = np.eye(len(captions), dtype=bool)
    for i in range(len(captions)):
        for j in range(len(captions)):
            if "text" in pair and any(captions[i][k] == captions[j][k] for k in range(len(captions[i]))):
                good[i][j] = True
            for modality in pair:
                if modality in contents and contents[modality][i] == contents[modality][j]:
                    good[i][j] = True
    return good


def accuracy(x: np.ndarray, y: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Percent of queries with a positive among the k first; candidates that tie with the best positive go before it."""
    hits = 0
    for i in range(len(x)):
        scores = [float(x[i] @ y[j]) for j in range(len(y))]
        best = max(scores[j] for j in range(len(y)) if positives[i][j])
        ahead = sum(scores[j] >= best and not positives[i][j] for j in range(len(y)))
        hits += ahead < k
    return 100 * hits / len(x)


def diversity(tokens: np.ndarray, kept: np.ndarray) -> float:
    """Mean squared cosine over all pairs of different kept tokens."""
    values = []
    for row, mask in zip(tokens, kept, strict=True):
        for a in range(len(row)):
            for b in range(len(row)):
                if a != b and mask[a] and mask[b]:
                    values.append((row[a] @ row[b] / np.linalg.norm(row[a]) / np.linalg.norm(row[b])) ** 2)
    return float(np.mean(values)) if values else 0.0


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Single-head attention of one row: softmax over the real keys only."""
    out = np.zeros((len(query), values.shape[1]))
    for n in range(len(query)):
        weights = np.array(
            [math.exp(query[n] @ k / math.sqrt(len(k))) if m else 0.0 for k, m in zip(keys, mask, strict=True)]
        )
        out[n] = (weights / weights.sum()) @ values
    return out
