"""Measuring: whole-gallery retrieval, and probes that ask what a set of tokens lets a reader know.

Retrieval is over all rows of a split, in chunks. A tie counts against us: a candidate that scores as high as the best
positive, up to rounding, is ranked before it, so constant features never look good.

Probes are trained on training rows and read on test rows; nothing is chosen on test rows.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import config_context
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tvl_align.console import UserError
from tvl_align.losses import positive_pairs
from tvl_align.optimisation import Schedule, descend, make_adamw
from tvl_align.runtime import generator, side_by_side

CHUNK = 256  # rows
TIE = 1e-6  # cosines that differ by less are equal: rounding decides between them
HIGHEST, LEAST_MASS = 70.0, 1e-20  # what exp of scores and sums of it may be in float32, with room for 10^7 of them
CONSTANT = 1e-6  # a feature that spreads less, relative to its mean, is rounding
T = TypeVar("T")
_seeding = Lock()  # of torch's global generator
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
        scores.masked_fill_(positive_pairs(ids[rows], ids[columns]), -torch.inf)
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
            positive = positive_pairs(ordered[rows, k : k + 1], ordered[columns, k : k + 1])
            if k:  # agreed in an earlier column: seen there
                positive &= ~positive_pairs(ordered[rows, :k], ordered[columns, :k])
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


def linear_probe(train: Tensor, train_labels: np.ndarray, test: Tensor, test_labels: np.ndarray, seed: int = 0) -> float:
    """Test accuracy in percent of a standardised logistic regression on (M, F) features.

    The regularisation is chosen on a fifth of the training rows held out for it, then refitted on all of them. Raises
    UserError for features that are NaN or inf.
    """
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
    with threadpool_limits(1):  # NumPy's
        yield from side_by_side((partial(probe, *job, seed) for job in jobs), lanes=torch.get_num_threads())


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
        descend(torch.stack(losses).sum(), optimizer, schedule(step))
    with torch.no_grad():
        parts = [probe(t.float(), m) for t, m in zip(test.split(CHUNK), test_mask.split(CHUNK), strict=True)]
    guesses = [torch.cat([part[i] for part in parts]).argmax(1).numpy() for i in range(len(classes))]
    return [100 * float((g == y).mean()) for g, y in zip(guesses, test_labels, strict=True)]


def way(score: float, chance: float, ceiling: float = 100.0) -> float:
    """Percent of the way from chance to the ceiling."""
    return 100 * (score - chance) / (ceiling - chance) if ceiling > chance else float("nan")


@dataclass(frozen=True)
class Labels:
    """Label columns for the rows of a data folder. levels: {factor: names}; values: {row name: {factor: level index}};
    ownership: {factor: modalities that carry it}, empty where it is not known."""

    levels: dict[str, list[str]]
    values: dict[str, dict[str, int]]
    ownership: dict[str, tuple[str, ...]]

    def of(self, factor: str, names: Sequence[str]) -> np.ndarray:
        """(M,) int64 level of every named row, -1 where it has none."""
        return np.array([self.values.get(name, {}).get(factor, -1) for name in names], dtype=np.int64)


def read_labels(path: Path) -> Labels:
    """A CSV with a row-name column (`vision` or `row`) and one per factor; a .json of its name beside it names owners."""
    if not path.is_file():
        raise UserError(f"no such label file: {path}; --labels takes a CSV with a vision column and one per factor.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            given = list(reader.fieldnames or ())
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file ({error}); save it as UTF-8.") from error
    key = next((c for c in ("vision", "row") if c in given), None)
    columns = [c for c in given if c not in ("split", key)]
    if key is None or not columns:
        raise UserError(f"{path} needs a vision column (or row) and a column per factor (it has: {given}).")
    for row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path} has a row with more or fewer cells than columns ({row[key]!r}); mend it.")
    levels = {c: sorted({row[c] for row in rows if row[c]}) for c in columns}
    place = {c: {name: i for i, name in enumerate(names)} for c, names in levels.items()}
    values = {row[key]: {c: place[c][row[c]] for c in columns if row[c]} for row in rows}
    about = path.with_suffix(".json")
    if about.is_file():
        try:
            legend = json.loads(about.read_text(encoding="utf-8")).get("factors", {})
            return Labels(levels, values, {c: tuple(legend[c]["ownership"]) if c in legend else () for c in columns})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{about} must hold {{factors: {{name: {{ownership: [...]}}}}}} ({error!r}).") from error
    return Labels(levels, values, {c: () for c in columns})
