"""Probes: classifiers on frozen tokens or features, fitted on training rows and tested on test rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.metrics.retrieval import CHUNK
from tvl_align.system.console import UserError
from tvl_align.system.runtime import generator
from tvl_align.system.workers import run_in_threads
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw

CONSTANT = 1e-6  # a feature with a smaller standard deviation, relative to its mean, counts as constant
T = TypeVar("T")
_seeding = Lock()  # protects torch's global generator


def linear_probe(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray, seed: int = 0) -> float:
    """Test accuracy in percent of logistic regression on standardised (M, F) features; labels (M,) int64.

    The regularisation strength is chosen on a held-out fifth of the training rows; the model is then refitted on all of
    them. Raises UserError for features that are NaN or inf.
    """
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    mean = train.float().mean(0)
    centred, centred_test = train - mean, test - mean
    std = (sum(part.square().sum(0) for part in centred.split(CHUNK)) / len(centred)).sqrt()
    std = torch.where(std > CONSTANT * mean.abs(), std, 1.0)
    if not (std.isfinite().all() and centred_test.sum().isfinite()):  # the mean is not finite if any training value is not
        raise UserError("the features to probe are NaN, inf or too large; the training diverged, so lower its --lr.")
    x, x_test = (rows.div_(std).numpy() for rows in (centred, centred_test))
    fit, check, y_fit, y_check = train_test_split(x, train_labels, test_size=0.2, random_state=seed)

    def model(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3)

    strengths = (0.003, 0.1)
    with config_context(assume_finite=True):  # checked above, once for all fits
        scores = [model(strength).fit(fit, y_fit).score(check, y_check) for strength in strengths]
        chosen = strengths[int(np.argmax(scores))]
        return 100 * float(model(chosen).fit(x, train_labels).score(x_test, test_labels))


def probe_all(probe: Callable[..., T], jobs: Iterable[tuple[Any, ...]], seed: int = 0) -> Iterator[T]:
    """Run `linear_probe` or `attentive_probe` on several tuples of arguments; yields the results in order.

    Runs as many probes at a time as torch has threads, each on one core, because small matrix products gain little from a
    second core.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # of NumPy
        yield from run_in_threads((partial(probe, *job, seed) for job in jobs), lanes=torch.get_num_threads())


class AttentiveProbe(nn.Module):
    """Attention pooling of (B, T, W) tokens with a few learned queries per factor, followed by an MLP per factor."""

    def __init__(self, tokens: int, width: int, classes: Sequence[int], queries: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(len(classes), queries, hidden) * 0.02)
        self.keys, self.values = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(queries * hidden, hidden), nn.GELU(), nn.Linear(hidden, count)) for count in classes
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """Tokens (B, T, W), mask (B, T) bool -> logits (B, classes) per factor."""
        x = self.norm(tokens) + self.positions
        keys, values = self.keys(x)[:, None], self.values(x)[:, None]
        queries = self.queries.expand(len(x), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
        return [head(pooled[:, i].flatten(1)) for i, head in enumerate(self.heads)]


def attentive_probe(
    train: Tensor,
    train_mask: Tensor,
    train_labels: Sequence[np.ndarray],
    test: Tensor,
    test_mask: Tensor,
    test_labels: Sequence[np.ndarray],
    seed: int = 0,
    steps: int = 600,
) -> list[float]:
    """Test accuracy in percent of an attentive probe for each factor, trained jointly on (M, T, W) tokens, masks (M, T).

    The factors share keys and values and have separate queries and heads. The schedule is fixed, so no split is used for
    model selection.
    """
    classes = [int(max(a.max(), b.max())) + 1 for a, b in zip(train_labels, test_labels, strict=True)]
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(train.shape[1], train.shape[2], classes)
    optimizer = make_adamw(probe.named_parameters(), weight_decay=0.05)
    batch = min(128, len(train))
    per_epoch = len(train) // batch
    schedule = Schedule(2e-3, steps, warmup=steps // 20)
    targets = torch.from_numpy(np.stack(train_labels)).long()
    for step in range(steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = torch.randperm(len(train), generator=generator(seed, epoch))
        rows = order[at * batch : (at + 1) * batch]
        logits = probe(train[rows].float(), train_mask[rows])
        losses = [F.cross_entropy(x, targets[i][rows]) for i, x in enumerate(logits)]
        backward_and_step(torch.stack(losses).sum(), optimizer, schedule(step))
    with torch.no_grad():
        parts = [probe(t.float(), m) for t, m in zip(test.split(CHUNK), test_mask.split(CHUNK), strict=True)]
    predictions = [torch.cat([part[i] for part in parts]).argmax(1).numpy() for i in range(len(classes))]
    return [100 * float((p == y).mean()) for p, y in zip(predictions, test_labels, strict=True)]


def normalised_score(score: float, chance: float, ceiling: float = 100.0) -> float:
    """Normalised score: 0 = chance, 100 = ceiling. NaN if the ceiling is not above chance."""
    return 100 * (score - chance) / (ceiling - chance) if ceiling > chance else float("nan")
