"""Probes: predictors of labels or codes from frozen tokens, fitted on probe rows and tested on other rows.

A linear probe says what a linear map reads; what it misses may still be there. Every group of tokens is therefore read by
several kinds of probes, and the strongest counts: usable information is relative to a family of predictors (V-information,
Xu et al. 2020, arXiv:2002.10689). All targets of a problem are fitted at once, and all problems of one width, with every
strength, as one batch of models (`batched.py`), on the device of the inputs.

Shapes: P problems, G models (a problem at a strength), M probe rows, Q test rows, F features, K components, T targets,
C outputs of a target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tvl_align.evaluation.batched import MLP, Attentive, Batched, Linear, Weights
from tvl_align.metrics.retrieval import CHUNK
from tvl_align.registers.principal import leading_eigenvectors
from tvl_align.system.console import UserError, progress
from tvl_align.system.runtime import generator
from tvl_align.system.workers import run_in_threads
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw

ProbeKind = Literal["linear", "mlp", "attentive"]
MODELS: dict[ProbeKind, type[Batched]] = {"linear": Linear, "mlp": MLP, "attentive": Attentive}
BATCH = 256
CACHED = 3  # problems of one batch on a CPU: more leave its cache
MAX_COMPONENTS = 512  # principal components of the features that linear and MLP probes read
NOISE_FLOOR = 1e-5  # components whose standard deviation is smaller, relative to the largest, are rounding errors
EPOCHS = 14  # of training, but at least
LEAST_STEPS = 300  # steps, and at most `max_steps`, by default
MAX_STEPS = 400
PATIENCE = 6  # epochs without improvement of any target, after which a model stops
LEARNING_RATE: dict[ProbeKind, float] = {"linear": 2e-2, "mlp": 6e-3, "attentive": 4e-3}
HELD_OUT = 5  # one row in 5 is held out, to stop the training and to choose the strength
HELD_OUT_AT_LEAST = 0.1  # of the rows, in whole groups


@dataclass(frozen=True)
class Strength:
    """Regularisation of a probe: weight decay, dropout, and the power of a component's standard deviation that is left after
    scaling (0: whitened, 1: as it is)."""

    decay: float
    dropout: float
    scale: float


STRENGTHS: dict[ProbeKind, tuple[Strength, ...]] = {
    "linear": (Strength(0.01, 0.0, 0.0), Strength(1.0, 0.0, 0.5)),
    "mlp": (Strength(0.5, 0.5, 0.5), Strength(0.05, 0.2, 0.0)),
    "attentive": (Strength(0.05, 0.1, 0.0),),
}
OF_FROZEN: dict[ProbeKind, tuple[Strength, ...]] = {"mlp": (Strength(0.05, 0.2, 1.0),)}  # more of frozen features


@dataclass(frozen=True)
class Target:
    """What a probe predicts: classes (M,) int64 or real numbers (M, C) float32, of the probe rows. -1 or NaN: unknown.

    classes: the number of classes; 0 for real numbers.
    """

    values: Tensor
    classes: int = 0

    @property
    def outputs(self) -> int:
        return self.classes or self.values.shape[1]

    @property
    def known(self) -> Tensor:
        """(M,) bool on the CPU: rows in which something is known."""
        return ((self.values >= 0) if self.classes else self.values.isfinite().any(1)).cpu()


@dataclass(frozen=True)
class Problem:
    """What is read (`targets`) from what: features ((M, F),) for linear and MLP probes, or tokens (M, L, W) and a mask
    (M, L) for attentive ones, of the probe rows (`train`) and of the test rows, on one device.

    groups: (M,) int64 groups of the probe rows, such as frames of one press; rows of a group are held out together.
    frozen: these are frozen features, whose hundreds of components are mostly noise; they are read as they are, too.
    """

    train: Sequence[Tensor]
    targets: Sequence[Target]
    test: Sequence[Tensor]
    groups: Tensor | None = None
    frozen: bool = False

    def strengths(self, kind: ProbeKind) -> tuple[Strength, ...]:
        """The strengths that a kind of probe tries."""
        return STRENGTHS[kind] + (OF_FROZEN.get(kind, ()) if self.frozen else ())


@dataclass(frozen=True)
class Probed:
    """The predictions of one probe for one target on Q test rows: logits (Q, classes), or numbers (Q, C)."""

    kind: ProbeKind
    output: Tensor
    held_out_loss: float


class Components:
    """Principal components of features (M, F), fitted on probe rows; constant features and rounding errors are left out.

    A covariance in float32 hides variances below 1e-7 of the largest among its own rounding errors. Whitened, these would be
    hundreds of components of noise that drown what is read. So variances of the leading directions are found in float64.

    Raises UserError for features that are NaN or inf.
    """

    def __init__(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        centred = features - self.mean
        if not centred.square().sum().isfinite():  # the mean is not finite if any value is not
            raise UserError("the features to probe are NaN, inf or too large; the training diverged, so lower its --lr.")
        _, leading = leading_eigenvectors(centred.T @ centred / len(centred), min(MAX_COMPONENTS, *centred.shape))
        scores = (centred @ leading).double()
        values, rotation = torch.linalg.eigh(scores.T @ scores / len(scores))
        std, vectors = values.flip(0).clamp(min=0).sqrt().float(), leading @ rotation.flip(1).float()
        count = int((std > NOISE_FLOOR * std[:1].clamp(min=1e-30)).sum().clamp(min=1))
        self.vectors, self.std = vectors[:, :count], std[:count].clamp(min=1e-30)

    def __call__(self, features: Tensor) -> Tensor:
        """(Q, F) -> (Q, K) components with variance 1 on the probe rows."""
        return (features.float() - self.mean) @ (self.vectors / self.std)

    def weights(self, scale: float) -> Tensor:
        """(K,): std^scale, with a mean square of 1."""
        weight = (self.std / self.std[0]).pow(scale)
        return weight / weight.square().mean().sqrt()


def fit_probes(
    problems: Sequence[Problem], kinds: Sequence[ProbeKind], seed: int = 0, max_steps: int = MAX_STEPS, title: str = "probe"
) -> list[dict[ProbeKind, list[Probed]]]:
    """Fit probes of the kinds for all problems (token sequences: attentive ones); returns the predictions for the test rows
    of every problem, {kind: [one for each target]}.

    For each target the strength and the epoch with the lowest loss on a held-out fifth of the probe rows are taken. The
    result depends on `seed` only. Raises UserError for features that are NaN or inf.
    """
    shapes: dict[torch.Size, list[int]] = {}
    for i, problem in enumerate(problems):
        shapes.setdefault(problem.train[0].shape[1:], []).append(i)
    on_cpu = bool(problems) and problems[0].train[0].device.type == "cpu"
    size = CACHED if on_cpu else max(1, len(problems))
    jobs, places = [], []
    for members in (alike[i : i + size] for alike in shapes.values() for i in range(0, len(alike), size)):
        batch = _Batch([problems[i] for i in members], seed)
        for kind in kinds if batch.components else ("attentive",):
            jobs.append(partial(batch.fit, kind, seed, max_steps))
            places.append((members, kind))
    found: list[dict[ProbeKind, list[Probed]]] = [{} for _ in problems]
    lanes = torch.get_num_threads() if on_cpu else 1
    with progress(len(jobs), title, "fit") as bar:
        for (members, kind), fitted in zip(places, run_in_threads(jobs, lanes), strict=True):
            for i, probed in zip(members, fitted, strict=True):
                found[i][kind] = probed
            bar.update()
    return found


class _Batch:
    """Problems of one width, padded to the same numbers of rows, components, targets and outputs."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems, self.device = problems, problems[0].train[0].device
        held, self.fitted = zip(*(_hold_out(p, seed) for p in problems), strict=True)
        train, self.test = ([getattr(p, side) for p in problems] for side in ("train", "test"))
        self.components: list[Components] = []
        if len(problems[0].train) == 1:
            self.components = [Components(p.train[0][rows].float()) for p, rows in zip(problems, self.fitted, strict=True)]
            most = max(len(c.std) for c in self.components)
            train, self.test = (
                [[F.pad(c(x), (0, most - len(c.std)))] for c, (x,) in zip(self.components, parts, strict=True)]
                for parts in (train, self.test)
            )
        self.inputs = [_stacked(parts, 0) for parts in zip(*train, strict=True)]
        self.shape = max(len(p.targets) for p in problems), max(t.outputs for p in problems for t in p.targets)
        self.labels = _stacked([self._labels(p.targets) for p in problems], -1)
        self.numbers = _stacked([self._numbers(p.targets, len(p.train[0])) for p in problems], torch.nan)
        self.blocked = torch.stack([self._blocked(p.targets) for p in problems])
        self.held = pad_sequence(list(held), batch_first=True)
        spare = torch.arange(self.held.shape[1], device=self.device) >= torch.tensor([[len(h)] for h in held]).to(
            self.device
        )
        at = torch.arange(len(problems), device=self.device)[:, None]
        self.held_labels = self.labels[at, self.held].masked_fill(spare[..., None], -1)
        self.held_numbers = self.numbers[at, self.held].masked_fill(spare[..., None, None], torch.nan)

    def _labels(self, targets: Sequence[Target]) -> Tensor:
        """(M, T) int64; -1 for unknown classes, real numbers and targets that there are not."""
        columns = [t.values if t.classes else t.values.new_full((len(t.values),), -1, dtype=torch.int64) for t in targets]
        return F.pad(torch.stack(columns, dim=1), (0, self.shape[0] - len(targets)), value=-1)

    def _numbers(self, targets: Sequence[Target], rows: int) -> Tensor:
        """(M, T, C) float32; NaN for what is no known real number."""
        made = torch.full((rows, *self.shape), torch.nan, device=self.device)
        for i, t in enumerate(targets):
            if not t.classes:
                made[:, i, : t.outputs] = t.values
        return made

    def _blocked(self, targets: Sequence[Target]) -> Tensor:
        """(1, T, C): -inf for classes that a target does not have, else 0."""
        made = torch.zeros(1, *self.shape, device=self.device)
        for i, t in enumerate(targets):
            if t.classes:
                made[:, i, t.classes :] = -torch.inf
        return made

    def _losses(self, outputs: Tensor, labels: Tensor, numbers: Tensor, problem: Tensor) -> Tensor:
        """(g, T): mean cross-entropy in nats, or mean squared error, of (g, B, T, C) outputs, labels (g, B, T), numbers
        (g, B, T, C)."""
        logits = outputs + self.blocked[problem]
        chosen = logits.gather(3, labels.clamp(min=0)[..., None])[..., 0]
        entropy = ((logits.logsumexp(3) - chosen) * (labels >= 0)).sum(1)  # on a CPU four times as fast as cross_entropy
        error = (outputs - numbers).nan_to_num(0.0).square().sum((1, 3))
        known = numbers.isfinite()
        return entropy / (labels >= 0).sum(1).clamp(min=1) + error / known.sum((1, 3)).clamp(min=1)

    def fit(self, kind: ProbeKind, seed: int, max_steps: int) -> list[list[Probed]]:
        """Train every problem at its strengths; returns the predictions of the best, [problem][target]."""
        members = [(i, s) for i, p in enumerate(self.problems) for s in p.strengths(kind)]
        models = MODELS[kind](
            self.inputs[0].shape[2:],
            self.shape,
            dropout=[s.dropout for _, s in members],
            decay=[s.decay for _, s in members],
            seed=generator(seed, 1).initial_seed(),
            device=self.device,
        )
        problem = torch.tensor([i for i, _ in members], device=self.device)
        inputs = self._inputs(members)
        most = max(map(len, self.fitted))
        steps = -(-most // BATCH)
        epochs = max(1, min(max_steps, max(LEAST_STEPS, EPOCHS * steps)) // steps)
        schedule = Schedule(LEARNING_RATE[kind], epochs * steps, warmup=steps)
        optimizer = make_adamw(models.named_parameters(), 0.0)  # weights decay by `models.decay`
        lowest = torch.full((len(members), self.shape[0]), torch.inf, device=self.device)
        best: list[list[Weights | None]] = [[None] * self.shape[0] for _ in members]
        alive, stale = torch.arange(len(members), device=self.device), torch.zeros_like(problem)
        for epoch in range(epochs):
            order = self._shuffled(most, generator(seed, 2, epoch))
            for step, at in enumerate(order.chunk(steps, dim=1)):
                which, rows = problem[alive][:, None], at[problem[alive]]
                outputs = models(*(x[alive[:, None], rows] for x in inputs))
                loss = self._losses(outputs, self.labels[which, rows], self.numbers[which, rows], problem[alive]).sum()
                lr = schedule(epoch * steps + step)
                backward_and_step(loss, optimizer, lr)
                models.decay(lr)
            improved = self._validate(models, inputs, problem, alive, lowest, best)
            stale[alive] = torch.where(improved, 0, stale[alive] + 1)
            going = (stale[alive] < PATIENCE).nonzero().squeeze(1)
            if len(going) < len(alive):
                models.keep(going, optimizer)
                alive = alive[going]
            if not len(alive):
                break
        models.eval()
        return [
            self._predicted(kind, models, i, {g: s for g, (of, s) in enumerate(members) if of == i}, lowest, best)
            for i in range(len(self.problems))
        ]

    def _inputs(self, members: Sequence[tuple[int, Strength]]) -> list[Tensor]:
        """(G, M, ...) of the probe rows of every model: of its problem, scaled as its strength says."""
        of = torch.tensor([i for i, _ in members], device=self.device)
        if not self.components:
            return [x[of] if len(of) > len(x) else x for x in self.inputs]
        return [self.inputs[0][of] * torch.stack([self._scale(*member) for member in members])[:, None]]

    def _scale(self, problem: int, strength: Strength) -> Tensor:
        """(K,): what components are multiplied by, zeros at the end where a problem has fewer than others."""
        weights = self.components[problem].weights(strength.scale)
        return F.pad(weights, (0, self.inputs[0].shape[2] - len(weights)))

    def _tests(self, problem: int, strength: Strength) -> Sequence[Tensor]:
        """The inputs (Q, ...) of the test rows, scaled as those of the probe rows."""
        test = self.test[problem]
        return [test[0] * self._scale(problem, strength)] if self.components else test

    def _shuffled(self, count: int, draw: torch.Generator) -> Tensor:
        """(P, count) rows to fit on, in a new order; a problem with fewer rows repeats them."""
        orders = {n: torch.randperm(n, generator=draw).repeat(-(-count // n))[:count] for n in {*map(len, self.fitted)}}
        return torch.stack([rows[orders[len(rows)].to(self.device)] for rows in self.fitted])

    @torch.no_grad()
    def _validate(
        self,
        models: Batched,
        inputs: Sequence[Tensor],
        problem: Tensor,
        alive: Tensor,
        lowest: Tensor,
        best: list[list[Weights | None]],
    ) -> Tensor:
        """Keep the weights of every model that has a lower held-out loss of a target than before, as the `best` of this
        target; returns which models have, (g,) bool."""
        models.eval()
        of = problem[alive]
        outputs = models(*(x[alive[:, None], self.held[of]] for x in inputs))
        losses = self._losses(outputs, self.held_labels[of], self.held_numbers[of], of)
        improved = losses < lowest[alive]
        for i in improved.any(1).nonzero().squeeze(1).tolist():
            weights, of_model = models.copy_of(i), best[int(alive[i])]
            for target in improved[i].nonzero().squeeze(1).tolist():
                of_model[target] = weights
        lowest[alive] = torch.where(improved, losses, lowest[alive])
        models.train()
        return improved.any(1)

    @torch.no_grad()
    def _predicted(
        self,
        kind: ProbeKind,
        models: Batched,
        problem: int,
        strengths: Mapping[int, Strength],
        lowest: Tensor,
        best: Sequence[Sequence[Weights | None]],
    ) -> list[Probed]:
        """Every target of a problem, predicted by the model with the lowest held-out loss of it, of {model: its strength}.

        Targets that one model at one epoch reads best are predicted at once; zeros if no loss of a target was finite."""
        found: list[Probed] = []
        outputs: dict[tuple[int, int], Tensor] = {}
        for j, target in enumerate(self.problems[problem].targets):
            g = min(strengths, key=lambda model: float(lowest[model, j]))
            weights = best[g][j]
            if (g, id(weights)) not in outputs:
                outputs[g, id(weights)] = _in_chunks(models, self._tests(problem, strengths[g]), weights)
            found.append(Probed(kind, outputs[g, id(weights)][:, j, : target.outputs], float(lowest[g, j])))
        return found


def _in_chunks(models: Batched, inputs: Sequence[Tensor], weights: Weights | None) -> Tensor:
    """(Q, T, C) outputs of the model of these weights for inputs (Q, ...); zeros without weights."""
    if weights is None:
        return inputs[0].new_zeros(len(inputs[0]), *models.outputs)
    chunks = zip(*(x[None].split(4 * CHUNK, dim=1) for x in inputs), strict=True)
    return torch.cat([models(*chunk, weights=weights) for chunk in chunks], dim=1)[0]


def _hold_out(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """The rows to hold out, a fifth, and those to fit on, in random order.

    Groups are drawn whole, none of more than a fifth of the rows. Where they do not make up HELD_OUT_AT_LEAST of the rows,
    or a target is known in no held-out row, rows are drawn one by one.
    """
    rows, draw = len(problem.train[0]), generator(seed, 0)
    order, count = torch.randperm(rows, generator=draw), rows // HELD_OUT
    if problem.groups is not None:
        group = problem.groups.cpu().unique(return_inverse=True)[1]
        sizes = group.bincount()
        drawn = torch.randperm(len(sizes), generator=draw)
        drawn = drawn[sizes[drawn] <= count]
        held = torch.isin(group, drawn[sizes[drawn].cumsum(0) <= count])
        if held.sum() >= HELD_OUT_AT_LEAST * rows and all(t.known[held].any() for t in problem.targets if t.known.any()):
            order, count = torch.cat([order[held[order]], order[~held[order]]]), int(held.sum())
    device = problem.train[0].device
    return order[:count].to(device), order[count:].to(device)


def _stacked(parts: Sequence[Tensor], fill: float) -> Tensor:
    """(P, M, ...) of (M, ...), padded with `fill` to the same number of rows."""
    return parts[0][None] if len(parts) == 1 else pad_sequence(list(parts), batch_first=True, padding_value=fill)


def accuracy(probed: Probed, labels: Tensor) -> Tensor:
    """(Q,) float32: 1 where the most likely class is the label, 0 where it is not or the label is unknown (-1)."""
    return (probed.output.argmax(1).cpu() == labels).float()


def bits(probed: Probed, labels: Tensor) -> Tensor:
    """(Q,) cross-entropy in bits of the predicted classes, for labels (Q,) int64."""
    return F.cross_entropy(probed.output.float().cpu(), labels, reduction="none") / math.log(2)


def squares(probed: Probed, values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of predictions of (Q, C) values, and squared distances of the values from the mean (C,) of the probe
    rows, both summed over the values that are not NaN: (Q,), (Q,)."""
    known = values.isfinite()
    parts = probed.output.cpu() - values, values - mean
    error, spread = (torch.where(known, part, 0.0).square().sum(1) for part in parts)
    return error, spread


def r2(probed: Probed, values: Tensor, mean: Tensor) -> float:
    """Share of the variance of (Q, C) values, around the mean (C,) of the probe rows, that is predicted; at most 1. NaN
    values are left out."""
    error, spread = squares(probed, values, mean)
    return 1 - float(error.sum() / spread.sum().clamp(min=1e-12))
