"""ProbeData: what can be read from a set of tokens. They are fitted on training rows and read on test rows."""

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

CONSTANT = 1e-6  # a feature that spreads less, relative to its mean, is rounding
T = TypeVar("T")
_seeding = Lock()  # of torch's global generator


def linear_probe(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray, seed: int = 0) -> float:
    """Test accuracy in percent of a standardised logistic regression on (M, F) features.

    The regularisation is chosen on a fifth of the training rows held out for it, then refitted on all of them. Raises
    UserError for features that are NaN or inf.
    """
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    mean = train.float().mean(0)
    x, x_test = train - mean, test - mean
    spread = (sum(part.square().sum(0) for part in x.split(CHUNK)) / len(x)).sqrt()
    spread = torch.where(spread > CONSTANT * mean.abs(), spread, 1.0)
    if not (spread.isfinite().all() and x_test.sum().isfinite()):  # the mean carries what is not finite in train to both
        raise UserError(
            "features to probe are NaN, inf or as large; the training that made them has diverged, lower its --lr."
        )
    x, x_test = (rows.div_(spread).numpy() for rows in (x, x_test))
    fit, check, y_fit, y_check = train_test_split(x, train_labels, test_size=0.2, random_state=seed)

    def model(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3)

    strengths = (0.003, 0.1)
    with config_context(assume_finite=True):  # seen above, and not with every fit again
        scores = [model(strength).fit(fit, y_fit).score(check, y_check) for strength in strengths]
        chosen = strengths[int(np.argmax(scores))]
        return 100 * float(model(chosen).fit(x, train_labels).score(x_test, test_labels))


def probe_all(probe: Callable[..., T], jobs: Iterable[tuple[Any, ...]], seed: int = 0) -> Iterator[T]:
    """The results of `linear_probe` or `attentive_probe` for several tuples of their data, in order. As many at a time as
    torch has threads, each on one core: small products gain little from a second one."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # NumPy's
        yield from run_in_threads((partial(probe, *job, seed) for job in jobs), lanes=torch.get_num_threads())


class AttentiveProbe(nn.Module):
    """A few queries per factor that attend to (B, T, W) tokens, and a small read-out: finds what is where."""

    def __init__(self, tokens: int, width: int, classes: Sequence[int], queries: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(len(classes), queries, hidden) * 0.02)
        self.keys, self.values = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.read = nn.ModuleList(
            nn.Sequential(nn.Linear(queries * hidden, hidden), nn.GELU(), nn.Linear(hidden, count)) for count in classes
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        x = self.norm(tokens) + self.positions
        keys, values = self.keys(x)[:, None], self.values(x)[:, None]
        queries = self.queries.expand(len(x), -1, -1, -1)
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
        return [head(read[:, i].flatten(1)) for i, head in enumerate(self.read)]


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
    """Test accuracy in percent of an attentive probe for each factor, trained together on (M, T, W) tokens.

    The factors share the keys and values but no read-out. The schedule is fixed, so nothing is chosen on any split.
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
        answers = probe(train[rows].float(), train_mask[rows])
        losses = [F.cross_entropy(a, targets[i][rows]) for i, a in enumerate(answers)]
        backward_and_step(torch.stack(losses).sum(), optimizer, schedule(step))
    with torch.no_grad():
        parts = [probe(t.float(), m) for t, m in zip(test.split(CHUNK), test_mask.split(CHUNK), strict=True)]
    guesses = [torch.cat([part[i] for part in parts]).argmax(1).numpy() for i in range(len(classes))]
    return [100 * float((g == y).mean()) for g, y in zip(guesses, test_labels, strict=True)]


def normalised_score(score: float, chance: float, ceiling: float = 100.0) -> float:
    """Percent of the way from chance to the ceiling."""
    return 100 * (score - chance) / (ceiling - chance) if ceiling > chance else float("nan")
