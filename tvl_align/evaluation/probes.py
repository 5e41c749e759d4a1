"""Probes: predictors of labels or codes from frozen tokens, fitted on probe rows and tested on other rows.

A linear probe says what a linear map reads; what it misses may still be there. Every group of tokens is therefore read by
several kinds of probes, and the strongest counts: usable information is relative to a family of predictors (V-information,
Xu et al. 2020, arXiv:2002.10689). All targets of a group are fitted at once, on the device of the inputs.

Shapes: M probe rows, Q test rows, F features, C outputs of a target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.metrics.retrieval import CHUNK
from tvl_align.registers.principal import leading_eigenvectors
from tvl_align.system.console import UserError
from tvl_align.system.runtime import generator
from tvl_align.training.optimisation import Schedule, backward_and_step, make_adamw

ProbeKind = Literal["linear", "mlp", "attentive"]
HIDDEN = 256  # width of the two hidden layers of an MLP probe
BATCH = 256
MAX_COMPONENTS = 512  # principal components of the features that linear and MLP probes read
NOISE_FLOOR = 1e-5  # components whose standard deviation is smaller, relative to the largest, are rounding errors
PATIENCE = 6  # epochs without improvement of any target, after which the training stops
LEARNING_RATE: dict[ProbeKind, float] = {"linear": 1e-2, "mlp": 2e-3, "attentive": 2e-3}
HELD_OUT = 5  # one row in 5 is held out, to stop the training and to choose the strength


_creating = Lock()  # protects torch's global generator


@dataclass(frozen=True)
class Strength:
    """Regularisation of a probe: weight decay, dropout, and the power of a component's standard deviation that is left after
    scaling (0: whitened, 1: as it is)."""

    decay: float
    dropout: float
    scale: float


STRENGTHS: dict[ProbeKind, tuple[Strength, ...]] = {
    "linear": (Strength(0.01, 0.0, 0.0), Strength(1.0, 0.0, 0.5)),
    "mlp": (Strength(0.05, 0.2, 1.0), Strength(0.5, 0.5, 0.5), Strength(0.05, 0.2, 0.0)),
    "attentive": (Strength(0.05, 0.1, 0.0),),
}


@dataclass(frozen=True)
class Target:
    """What a probe predicts: classes (M,) int64 or real numbers (M, G) float32, of the probe rows. -1 or NaN: unknown.

    classes: the number of classes; 0 for real numbers.
    """

    values: Tensor
    classes: int = 0

    @property
    def outputs(self) -> int:
        return self.classes or self.values.shape[1]

    def loss(self, output: Tensor, rows: Tensor) -> Tensor:
        """Mean cross-entropy in nats, or mean squared error, of outputs (b, C) for the given rows (b,) -> ()."""
        values = self.values[rows]
        if self.classes:
            return F.cross_entropy(output, values, ignore_index=-1, reduction="sum") / (values >= 0).sum().clamp(min=1)
        known = values.isfinite()
        return ((output - values.nan_to_num()) * known).square().sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class Probed:
    """The predictions of one probe for one target on Q test rows: logits (Q, classes), or numbers (Q, G)."""

    kind: ProbeKind
    output: Tensor
    held_out_loss: float


class Dropout(nn.Module):
    """Dropout whose masks are drawn from a generator of its own, so that probes in several threads repeat exactly."""

    def __init__(self, rate: float, draw: torch.Generator) -> None:
        super().__init__()
        self.rate, self.draw = rate, draw

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        return x * (torch.rand(x.shape, generator=self.draw, device=x.device) >= self.rate) / (1 - self.rate)


class AttentiveProbe(nn.Module):
    """Attention pooling of (B, T, W) tokens with a few learned queries per target, followed by an MLP per target."""

    def __init__(
        self, tokens: int, width: int, outputs: Sequence[int], dropout: float, draw: torch.Generator, queries: int = 4
    ) -> None:
        super().__init__()
        hidden = HIDDEN // 2
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(len(outputs), queries, hidden) * 0.02)
        self.keys, self.values = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(queries * hidden, hidden), nn.GELU(), Dropout(dropout, draw), nn.Linear(hidden, count))
            for count in outputs
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, T, W), mask (B, T) bool -> the outputs of all targets, (B, sum of C)."""
        x = self.norm(tokens.float()) + self.positions[: tokens.shape[1]]
        keys, values = self.keys(x)[:, None], self.values(x)[:, None]
        queries = self.queries.expand(len(x), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
        return torch.cat([head(pooled[:, i].flatten(1)) for i, head in enumerate(self.heads)], dim=1)


def mlp(size: int, outputs: int, dropout: float, draw: torch.Generator) -> nn.Sequential:
    """Features (B, F) -> two hidden layers of HIDDEN units, each with LayerNorm, GELU and dropout -> (B, outputs)."""
    layers: list[nn.Module] = []
    for width in (size, HIDDEN):
        layers += [nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), Dropout(dropout, draw)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, outputs))


class Components:
    """Principal components of features (M, F), fitted on probe rows; constant features and rounding errors are left out.

    Raises UserError for features that are NaN or inf.
    """

    def __init__(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        centred = features - self.mean
        if not centred.square().sum().isfinite():  # the mean is not finite if any value is not
            raise UserError("the features to probe are NaN, inf or too large; the training diverged, so lower its --lr.")
        values, vectors = leading_eigenvectors(centred.T @ centred / len(centred), min(MAX_COMPONENTS, *centred.shape))
        std = values.sqrt()
        count = int((std > NOISE_FLOOR * std[:1].clamp(min=1e-30)).sum().clamp(min=1))
        self.vectors, self.std = vectors[:, :count], std[:count].clamp(min=1e-30)

    def __call__(self, features: Tensor, scale: float) -> Tensor:
        """(Q, F) -> (Q, K) components, scaled by std^(scale - 1) and to a mean variance of 1 on the probe rows."""
        weight = (self.std / self.std[0]).pow(scale)
        return (features - self.mean) @ (self.vectors * (weight / weight.square().mean().sqrt() / self.std))


def fit_probes(
    kind: ProbeKind,
    train: Sequence[Tensor],
    targets: Sequence[Target],
    test: Sequence[Tensor],
    seed: int = 0,
    max_steps: int = 400,
    thorough: bool = True,
) -> list[Probed]:
    """Fit probes of one kind for all targets at once; returns the predictions for the test rows, one entry per target.

    train, test: (features (M, F),) for linear and MLP probes, (tokens (M, T, W), mask (M, T)) for attentive ones, on one
    device. thorough: try every strength, else the first only. For each target the strength and the epoch with the lowest
    loss on a held-out fifth of the probe rows are taken. The result depends on `seed` only. Raises UserError for features
    that are NaN or inf.
    """
    device = train[0].device
    order = torch.randperm(len(train[0]), generator=generator(seed, 0)).to(device)
    held, fit = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    components = Components(train[0][fit].float()) if kind != "attentive" else None
    best = [Probed(kind, torch.empty(0), float("inf")) for _ in targets]
    for number, strength in enumerate(STRENGTHS[kind] if thorough else STRENGTHS[kind][:1]):
        parts = [[components(part[0].float(), strength.scale)] if components else list(part) for part in (train, test)]
        draw = torch.Generator(device).manual_seed(generator(seed, 1, number).initial_seed())
        module = _module(kind, parts[0][0].shape[1:], [t.outputs for t in targets], strength.dropout, draw).to(device)
        optimizer = make_adamw(module.named_parameters(), strength.decay)
        steps = -(-len(fit) // BATCH)
        epochs = max(1, max_steps // steps)
        schedule = Schedule(LEARNING_RATE[kind], epochs * steps, warmup=steps)
        stale = 0
        for epoch in range(epochs):
            module.train()
            shuffled = fit[torch.randperm(len(fit), generator=draw, device=device)]
            for step, rows in enumerate(shuffled.split(BATCH)):
                outputs = _split(module(*(x[rows] for x in parts[0])), targets)
                losses = [t.loss(output, rows) for t, output in zip(targets, outputs, strict=True)]
                backward_and_step(torch.stack(losses).sum(), optimizer, schedule(epoch * steps + step))
            better = _validate(module, kind, targets, parts, held, best)
            stale = 0 if better else stale + 1
            if stale == PATIENCE:
                break
    return best


@torch.no_grad()
def _validate(
    module: nn.Module,
    kind: ProbeKind,
    targets: Sequence[Target],
    parts: Sequence[Sequence[Tensor]],
    held: Tensor,
    best: list[Probed],
) -> bool:
    """Replace the entries of `best` whose held-out loss has improved; returns whether any has."""
    module.eval()
    outputs = _split(module(*(x[held] for x in parts[0])), targets)
    losses = [float(t.loss(output, held)) for t, output in zip(targets, outputs, strict=True)]
    improved = [i for i, loss in enumerate(losses) if loss < best[i].held_out_loss]
    if improved:
        chunks = [module(*chunk) for chunk in zip(*(x.split(4 * CHUNK) for x in parts[1]), strict=True)]
        tested = _split(torch.cat(chunks), targets)
        for i in improved:
            best[i] = Probed(kind, tested[i], losses[i])
    return bool(improved)


def _split(outputs: Tensor, targets: Sequence[Target]) -> tuple[Tensor, ...]:
    return outputs.split([t.outputs for t in targets], dim=1)


def _module(
    kind: ProbeKind, shape: Sequence[int], outputs: Sequence[int], dropout: float, draw: torch.Generator
) -> nn.Module:
    """An untrained probe; its weights and dropout masks are drawn from `draw`."""
    with _creating, torch.random.fork_rng(devices=[]):  # modules draw their weights from the global generator
        torch.manual_seed(draw.initial_seed())
        if kind == "attentive":
            return AttentiveProbe(shape[0], shape[1], outputs, dropout, draw)
        if kind == "mlp":
            return mlp(shape[0], sum(outputs), dropout, draw)
        return nn.Linear(shape[0], sum(outputs))


def accuracy(probed: Probed, labels: Tensor) -> Tensor:
    """(Q,) float32: 1 where the most likely class is the label, 0 where it is not or the label is unknown (-1)."""
    return (probed.output.argmax(1).cpu() == labels).float()


def bits(probed: Probed, labels: Tensor) -> Tensor:
    """(Q,) cross-entropy in bits of the predicted classes, for labels (Q,) int64."""
    return F.cross_entropy(probed.output.float().cpu(), labels, reduction="none") / math.log(2)


def r2(probed: Probed, values: Tensor, mean: Tensor) -> float:
    """Share of the variance of (Q, G) values, around the mean (G,) of the probe rows, that is predicted; at most 1."""
    error = (probed.output.cpu() - values).square().sum()
    return 1 - float(error / (values - mean).square().sum().clamp(min=1e-12))


def normalised_score(score: float, chance: float, ceiling: float = 100.0) -> float:
    """Normalised score: 0 = chance, 100 = ceiling. Raises ValueError if the ceiling is not above chance."""
    if not ceiling > chance:
        raise ValueError(f"the ceiling {ceiling} is not above chance {chance}")
    return 100 * (score - chance) / (ceiling - chance)
